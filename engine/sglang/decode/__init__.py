"""Decode engines: the restored prefix, and the blocks that fill."""
