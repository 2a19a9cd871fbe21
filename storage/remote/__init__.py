"""The remote tier: blocks in packs, in any store of objects."""
