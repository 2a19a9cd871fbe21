"""Entry points: the cluster, its gateway, and their configuration."""
