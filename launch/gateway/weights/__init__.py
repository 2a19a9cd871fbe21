"""Weight updates: a trainer talks to the gateway as to one engine (docs/weights.md)."""
