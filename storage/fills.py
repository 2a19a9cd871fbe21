"""Blocks on their way into DRAM slots, and the plans that wait for them."""

from __future__ import annotations

from collections import Counter

from common.block import BlockKey, BlockLabel, TierName
from common.ids import PlanId
from common.messages.from_agents import Holding
from storage.index.holdings import Holdings
from storage.slot_pool import SlotPool


class _Fill:
    """A slot that is being filled: from ``tier``, or from an engine where that is None."""

    __slots__ = ("tier", "plans", "is_quarantined")

    def __init__(self, tier: TierName | None) -> None:
        self.tier = tier
        self.plans: set[PlanId] = set()
        self.is_quarantined = False


class Fills:
    """As a container it has the blocks under way: read from a tier, or *pulled* out of an engine.

    What comes to and leaves DRAM by them is noted in the holdings.
    """

    def __init__(self, pool: SlotPool, holdings: Holdings) -> None:
        self._pool = pool
        self._holdings = holdings
        self._fills: dict[BlockKey, _Fill] = {}
        self.reads: Counter[TierName] = Counter()
        """Blocks that are being read, by tier."""
        self.pulls = 0
        self.evicted_blocks_total = 0
        """From DRAM, for want of a free slot."""

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._fills

    def begin(self, key: BlockKey, tier: TierName | None, nbytes: int = 0) -> None:
        """Give a block of this size a slot; the caller fills it. Without a tier it is pulled."""
        if (evicted := self._pool.begin_fill(key, nbytes)) is not None:
            self.evicted_blocks_total += 1
            self._holdings.change(Holding(evicted, TierName.DRAM, False))
        self._fills[key] = _Fill(tier)
        if tier is not None:
            self.reads[tier] += 1
        else:
            self.pulls += 1

    def end(self, key: BlockKey, label: BlockLabel | None) -> list[PlanId]:
        """The slot is filled, or, without a label, nothing came; returns who has waited, the
        first plan first."""
        fill = self._fills.pop(key)
        if fill.tier is not None:
            self.reads[fill.tier] -= 1
        else:
            self.pulls -= 1
        if label is not None:
            self._pool.commit(key, label)
            self._holdings.change(Holding(key, TierName.DRAM, True))
        else:
            self._pool.abandon(key)
        return sorted(fill.plans)

    def read_elsewhere(self, key: BlockKey, tier: TierName) -> None:
        """A read failed, and the block is read from another tier into the same slot."""
        fill = self._fills[key]
        if fill.tier is not None:
            self.reads[fill.tier] -= 1
        fill.tier = tier
        self.reads[tier] += 1

    def check_pulled(self, key: BlockKey) -> None:
        """Raises KeyError, unless the block is on its way out of an engine."""
        if key not in self._fills or self._fills[key].tier is not None:
            raise KeyError(f"block {key.hex()} is not reserved")

    def is_quarantined(self, key: BlockKey) -> bool:
        """Will nothing come into the slot, which is not free yet all the same?"""
        return key in self._fills and self._fills[key].is_quarantined

    def quarantine(self, key: BlockKey) -> list[PlanId]:
        """Nobody is to wait for the block from now on; returns who has."""
        fill = self._fills[key]
        fill.is_quarantined = True
        return sorted(fill.plans)

    def wait(self, key: BlockKey, plan: PlanId) -> None:
        self._fills[key].plans.add(plan)

    def stop_waiting(self, key: BlockKey, plan: PlanId) -> None:
        self._fills[key].plans.discard(plan)

    def first_waiting(self, key: BlockKey) -> PlanId | None:
        """Of the plans that wait for the block, the first."""
        return min(self._fills[key].plans, default=None)
