"""A plan's share of reads, and the queue in which plans wait for DRAM slots."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping

from common.block import BlockKey, TierName
from common.ids import PlanId


class ShareState:
    """The blocks that one plan wants in DRAM: queued, then reading, then settled."""

    def __init__(self, plan: PlanId, keys: list[BlockKey], deadline_s: float, now: float) -> None:
        self.plan = plan
        self.keys = keys
        self.deadline_s = deadline_s
        self.sizes: Mapping[BlockKey, int] = {}
        """Of those that do not fill a slot."""
        self.admitted_s = now
        self.granted_s: float | None = None
        self.settled_s: float | None = None
        self.waiting: set[BlockKey] = set()
        """Blocks with slots that are still being filled."""
        self.unpinned_slots_wanted = 0
        """Known once it was at the queue's head and there were fewer."""
        self.read_bytes: dict[TierName, int] = {}
        self.promised_blocks: Counter[TierName] = Counter()
        """Blocks to be read for it, as far as is known before it gets its slots."""


class ShareQueue:
    """Every plan that wants or pins blocks; of those that wait for slots the oldest is next, in
    whatever order they came."""

    def __init__(self) -> None:
        self._shares: dict[PlanId, ShareState] = {}
        self._queue: dict[PlanId, ShareState] = {}
        self._order: list[PlanId] = []
        """Heap of those in the queue, and of some that have left it."""
        self._timers: list[tuple[float, PlanId]] = []
        self._settled = 0
        self.promised_blocks: Counter[TierName] = Counter()
        """Of all queued shares."""

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def settled(self) -> int:
        return self._settled

    @property
    def reading(self) -> int:
        return len(self._shares) - len(self._queue) - self._settled

    def __contains__(self, plan: PlanId) -> bool:
        return plan in self._shares

    def get(self, plan: PlanId) -> ShareState | None:
        return self._shares.get(plan)

    def head(self) -> ShareState | None:
        """The share that gets slots next."""
        while self._order and self._order[0] not in self._queue:
            heapq.heappop(self._order)
        return self._queue[self._order[0]] if self._order else None

    def enqueue(self, share: ShareState) -> None:
        self._shares[share.plan] = share
        self._queue[share.plan] = share
        heapq.heappush(self._order, share.plan)
        self.promised_blocks.update(share.promised_blocks)
        heapq.heappush(self._timers, (share.deadline_s, share.plan))

    def dequeue(self, share: ShareState) -> None:
        """The share waits for slots no longer; nothing happens if it did not."""
        if self._queue.pop(share.plan, None) is not None:
            self.promised_blocks.subtract(share.promised_blocks)

    def mark_settled(self, share: ShareState, now: float, hold_s: float) -> None:
        """It will be due again after ``hold_s`` unless it is removed."""
        self.dequeue(share)
        share.settled_s = now
        self._settled += 1
        heapq.heappush(self._timers, (now + hold_s, share.plan))

    def remove(self, share: ShareState) -> None:
        self.dequeue(share)
        del self._shares[share.plan]
        self._settled -= share.settled_s is not None

    def due(self, now: float) -> Iterator[ShareState]:
        """Shares of which some time has passed: a deadline, or the hold after settlement."""
        while self._timers and self._timers[0][0] <= now:
            _, plan = heapq.heappop(self._timers)
            share = self._shares.get(plan)
            if share is not None:
                yield share
