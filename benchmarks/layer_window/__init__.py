"""Prefill with KV of a few layers in memory, beside KV of all of them."""
