"""Weights that change while a real cluster serves."""
