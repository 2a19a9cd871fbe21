"""An engine's own HTTP port, which is the gateway's alone."""
