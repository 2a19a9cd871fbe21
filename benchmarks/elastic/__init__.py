"""Nodes that join, leave and are killed, under load: what clients see of it."""
