"""A decode engine: prefixes restored, full blocks stored."""
