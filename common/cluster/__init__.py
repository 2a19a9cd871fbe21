"""What nodes and the gateway tell each other of who belongs to the cluster."""
