"""Packs of blocks: their bytes, who knows which, reads, uploads and upkeep."""
