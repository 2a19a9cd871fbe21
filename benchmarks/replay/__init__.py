"""A trace of conversations, replayed."""
