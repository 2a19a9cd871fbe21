"""Prefill engines: forwards, sends, batches, the pool of a layer window."""
