"""A job's rows."""
