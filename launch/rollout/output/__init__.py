"""A job's samples, and its folder."""
