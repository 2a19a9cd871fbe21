"""Which blocks a tier holds, whose they are, and which go first."""
