"""Blocks in DRAM on their way to SSD and remote, a bounded number at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from common.block import BlockKey, TierName
from storage.index.holdings import Holdings
from storage.slot_pool import SlotPool
from storage.store_options import StoreOptions
from storage.tiers.contract import BlockIO, Tier

_OWNER = -1
"""Pins blocks in the slot pool until their writes have ended."""
WRITE_POLICIES = ("everywhere", "reused")
"""Where a new block is written: to every tier at once; or to SSD at once, and to remote when a
plan uses it again."""
PROMOTION_POLICIES = ("always", "reused", "never")
"""When a block that was read from remote is kept on SSD: the first time, the second, never."""


class WriteBehind:
    """``len()``: blocks being written, each pinned in its slot.

    Raises ValueError for a policy that is none.
    """

    def __init__(
        self,
        pool: SlotPool,
        tiers: Mapping[TierName, Tier],
        holdings: Holdings,
        options: StoreOptions,
    ) -> None:
        _check(options.write_policy, WRITE_POLICIES)
        _check(options.promotion_policy, PROMOTION_POLICIES)
        self._pool = pool
        self._tiers = tiers
        self._holdings = holdings
        self._queue_blocks_max = options.write_queue_blocks
        self._remote_waits_for_use = options.write_policy == "reused" and len(tiers) > 1
        self._promotion_policy = options.promotion_policy
        self._targets: dict[BlockKey, set[TierName]] = {}
        self.skipped_total = 0
        """Blocks that were not written for want of room in the queue."""

    def __len__(self) -> int:
        return len(self._targets)

    def targets_of_new(self) -> list[TierName]:
        """Where a block from an engine is written at once."""
        return [TierName.SSD] if self._remote_waits_for_use else list(self._tiers)

    def targets_of_use(self, key: BlockKey, found_in: TierName) -> list[TierName]:
        """Where a resident block is to be written since a plan uses it."""
        if found_in is not TierName.REMOTE:
            targets = [TierName.REMOTE] if self._remote_waits_for_use else []
        else:
            targets = [TierName.SSD] if self._is_promoted(key) else []
        return [tier for tier in targets if self._lacks(key, tier)]

    def _is_promoted(self, key: BlockKey) -> bool:
        if self._promotion_policy == "reused":
            return self._pool.resident.uses(key) > 1
        return self._promotion_policy == "always"

    def _lacks(self, key: BlockKey, tier: TierName) -> bool:
        return tier in self._tiers and not self._holdings.has(key, tier)

    def start(self, key: BlockKey, tiers: Iterable[TierName]) -> None:
        """Write a resident block to those of the tiers that do not hold it."""
        targets = {tier for tier in tiers if self._lacks(key, tier)}
        if not targets or key in self._targets:
            return
        if len(self._targets) >= self._queue_blocks_max:
            self.skipped_total += 1
            return
        self._pool.pin(key, _OWNER)
        self._targets[key] = targets
        for name in list(targets):
            block = BlockIO(key, self._pool.buffer(key), self._pool.label(key))
            self._tiers[name].submit_writes([block])

    def end(self, key: BlockKey, tier: TierName) -> None:
        """A tier has completed its write, with or without success."""
        targets = self._targets[key]
        targets.discard(tier)
        if not targets:
            del self._targets[key]
            self._pool.unpin(key, _OWNER)


def _check(name: str, names: Collection[str]) -> None:
    if name not in names:
        raise ValueError(f"unknown policy {name!r}; choose from {', '.join(names)}")
