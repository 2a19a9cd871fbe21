"""Mooncake, the agent, and the messages between processes."""
