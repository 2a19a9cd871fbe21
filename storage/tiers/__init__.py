"""The contract of a tier below DRAM, and what all tiers do alike."""
