"""Engines and agents as rows of arrays, which are reused."""
