"""``/dashboard``: a cluster in a browser."""
