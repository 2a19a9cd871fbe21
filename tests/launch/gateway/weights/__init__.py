"""A trainer and the gateway, before engines that are stubs with an engine's own weights."""
