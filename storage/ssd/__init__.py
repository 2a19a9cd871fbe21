"""The SSD tier: slabs of equal slots on local disks."""
