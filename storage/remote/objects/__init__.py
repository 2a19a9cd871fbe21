"""Stores of objects below a URL, and how they are called."""
