"""Blocks in DRAM on their way to SSD and remote, a bounded number at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from storage.block import BlockKey, BlockLabel
from storage.slot_pool import SlotPool
from storage.tier import BlockIO, Tier, TierName

_OWNER = -1
"""Pins blocks in the slot pool until their writes have ended."""


class WriteBehind:
    """``len()``: blocks being written, each pinned in its slot."""

    def __init__(
        self, pool: SlotPool, tiers: Mapping[TierName, Tier], queue_blocks_max: int
    ) -> None:
        self._pool = pool
        self._tiers = tiers
        self._queue_blocks_max = queue_blocks_max
        self._targets: dict[BlockKey, set[TierName]] = {}

    def __len__(self) -> int:
        return len(self._targets)

    def start(self, key: BlockKey, targets: Iterable[TierName], label: BlockLabel) -> bool:
        """Write a resident block to the tiers; False if the queue is full."""
        if len(self._targets) >= self._queue_blocks_max:
            return False
        names = set(targets)
        self._pool.pin(key, _OWNER)
        self._targets[key] = names
        for name in list(names):
            self._tiers[name].submit_writes([BlockIO(key, self._pool.buffer(key), label)])
        return True

    def end(self, key: BlockKey, tier: TierName) -> None:
        """A tier has completed its write, with or without success."""
        targets = self._targets[key]
        targets.discard(tier)
        if not targets:
            del self._targets[key]
            self._pool.unpin(key, _OWNER)
