"""Hosts placed, started and watched by Ray, which carries no request, no KV, no health."""
