"""The ranks of one engine."""
