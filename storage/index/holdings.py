"""Which tiers hold which blocks, as one consistent view."""

from __future__ import annotations

from collections.abc import Iterator

from common.block import BlockKey, TierName

_BITS = {TierName.DRAM: 1, TierName.SSD: 2, TierName.REMOTE: 4}
_DRAM_ONLY = _BITS[TierName.DRAM]


class Holdings:
    """A set of tiers for each block, with the counts that operators ask for."""

    def __init__(self) -> None:
        self._held: dict[BlockKey, int] = {}
        self._volatile = 0

    @property
    def volatile(self) -> int:
        """Blocks in DRAM and nowhere else."""
        return self._volatile

    @property
    def durable(self) -> int:
        """Blocks on SSD or remote."""
        return len(self._held) - self._volatile

    def has(self, key: BlockKey, tier: TierName) -> bool:
        return bool(self._held.get(key, 0) & _BITS[tier])

    def has_any(self, key: BlockKey) -> bool:
        return key in self._held

    def change(self, key: BlockKey, tier: TierName, held: bool) -> bool:
        """Note a gain or loss; False if it was known already."""
        before = self._held.get(key, 0)
        after = before | _BITS[tier] if held else before & ~_BITS[tier]
        if after == before:
            return False
        self._volatile += (after == _DRAM_ONLY) - (before == _DRAM_ONLY)
        if after:
            self._held[key] = after
        else:
            del self._held[key]
        return True

    def __iter__(self) -> Iterator[tuple[BlockKey, TierName]]:
        """Every (block, tier)."""
        for key, bits in self._held.items():
            for tier, bit in _BITS.items():
                if bits & bit:
                    yield key, tier
