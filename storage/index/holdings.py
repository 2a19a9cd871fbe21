"""Which tiers hold which blocks, as one consistent view."""

from __future__ import annotations

from collections.abc import Iterator

from common.block import BlockKey, TierName
from common.messages.from_agents import Holding

_BITS = {TierName.DRAM: 1, TierName.SSD: 2, TierName.REMOTE: 4}
_DRAM_ONLY = _BITS[TierName.DRAM]


class Holdings:
    """A set of tiers for each block, with the counts that operators ask for."""

    def __init__(self) -> None:
        self._held: dict[BlockKey, int] = {}
        self._volatile = 0
        self._changes: list[Holding] = []

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

    def change(self, holding: Holding) -> None:
        """Note a gain or loss; nothing happens if it was known already."""
        key, bit = holding.key, _BITS[holding.tier]
        before = self._held.get(key, 0)
        after = before | bit if holding.held else before & ~bit
        if after == before:
            return
        self._volatile += (after == _DRAM_ONLY) - (before == _DRAM_ONLY)
        if after:
            self._held[key] = after
        else:
            del self._held[key]
        self._changes.append(holding)

    def take_changes(self) -> list[Holding]:
        """Gains and losses since the last call."""
        changes, self._changes = self._changes, []
        return changes

    def __iter__(self) -> Iterator[tuple[BlockKey, TierName]]:
        """Every (block, tier)."""
        for key, bits in self._held.items():
            for tier, bit in _BITS.items():
                if bits & bit:
                    yield key, tier
