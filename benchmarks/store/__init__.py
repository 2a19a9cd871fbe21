"""The tiers against what is under them."""
