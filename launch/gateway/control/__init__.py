"""The gateway's connections to agents and engines."""
