"""Agents and engines as the gateway sees them: connections, who is alive, a plan's hand-over."""
