"""A prefill engine: its batches, its layers, and what leaves for decode engines."""
