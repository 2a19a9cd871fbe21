"""``python -m launch.node``: one host of a cluster."""
