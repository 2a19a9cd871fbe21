"""Reads plans' shares into DRAM: slots first, in the order of the plans, and then the blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from common.block import BlockKey, BlockLabel, TierName
from common.ids import PlanId
from storage.fills import Fills
from storage.index.holdings import Holdings
from storage.share_queue import ShareQueue, ShareState
from storage.slot_pool import SlotPool
from storage.store_events import ShareSettled, StoreStats
from storage.store_options import StoreOptions
from storage.tiers.contract import BlockIO, Completion, Tier

NO_SIZES: Mapping[BlockKey, int] = MappingProxyType({})
"""Of blocks that fill their slots."""


class _Classified(NamedTuple):
    """The leading blocks of a share, as many as fit the pool."""

    here: list[BlockKey]
    """In DRAM."""
    joined: list[BlockKey]
    """Being filled."""
    reads: dict[BlockKey, TierName]
    """To be read, and from where."""


class ShareReads:
    """Shares get their slots in the order of their plans, each all at once, and only then are
    read: SSD before remote, a failed SSD read again from remote.

    ``use(key, tier)`` is called with each block of a plan, and where it was found.
    """

    def __init__(
        self,
        pool: SlotPool,
        tiers: Mapping[TierName, Tier],
        holdings: Holdings,
        options: StoreOptions,
        stats: StoreStats,
        use: Callable[[BlockKey, TierName], None],
    ) -> None:
        self.fills = Fills(pool, holdings)
        self.queue = ShareQueue()
        self._pool = pool
        self._tiers = tiers
        self._holdings = holdings
        self._options = options
        self._stats = stats
        self._use = use
        self._ready: list[ShareState] = []
        """Shares that wait for nothing more."""
        self._settled: list[ShareSettled] = []

    def admit(
        self,
        plan: PlanId,
        keys: Sequence[BlockKey],
        deadline: float,
        now: float,
        sizes: Mapping[BlockKey, int] = NO_SIZES,
    ) -> None:
        """See :meth:`storage.tiered_store.TieredStore.admit`."""
        if plan in self.queue:
            self._stats.refused_plans_total += 1
            return
        if self.queue.queued >= self._options.plans_max:
            self._stats.refused_plans_total += 1
            self._settled.append(ShareSettled(plan, [False] * len(keys), {}, 0.0, 0.0))
            return
        share = ShareState(plan, list(keys), deadline, now)
        share.sizes = sizes
        share.promised_blocks.update(
            TierName.SSD if self._holdings.has(key, TierName.SSD) else TierName.REMOTE
            for key in keys
            if not self._holdings.has(key, TierName.DRAM) and key not in self.fills
        )
        self.queue.enqueue(share)
        self._grant(now)

    def release(self, plan: PlanId) -> None:
        """See :meth:`storage.tiered_store.TieredStore.release`."""
        if (share := self.queue.get(plan)) is None:
            return
        self._stop_waiting(share)
        self._pool.unpin_all(plan)
        self.queue.remove(share)

    @property
    def slots_wanted(self) -> int:
        """Unpinned slots that the share at the queue's head waits for."""
        head = self.queue.head()
        return head.unpinned_slots_wanted if head is not None else 0

    def take_settled(self) -> list[ShareSettled]:
        """Since the last call."""
        settled, self._settled = self._settled, []
        return settled

    # ---- slots ------------------------------------------------------------------------

    def _grant(self, now: float) -> None:
        """Give slots to the queue's head, and so on, until they do not suffice."""
        while (share := self.queue.head()) is not None:
            if self._pool.available < share.unpinned_slots_wanted:
                return  # nothing that matters has changed since it was last looked at
            blocks = self._classify(share)
            wanted = len(blocks.reads) + sum(map(self._pool.is_evictable, blocks.here))
            if wanted > self._pool.available:
                share.unpinned_slots_wanted = wanted
                return
            self.queue.dequeue(share)
            share.granted_s = now
            self._begin(share, blocks)

    def _classify(self, share: ShareState) -> _Classified:
        here: list[BlockKey] = []
        joined: list[BlockKey] = []
        reads: dict[BlockKey, TierName] = {}
        for key in dict.fromkeys(share.keys):
            if len(here) + len(joined) + len(reads) == self._pool.num_slots:
                break
            if self.fills.is_quarantined(key):
                continue
            if key in self.fills:
                joined.append(key)
            elif self._holdings.has(key, TierName.DRAM):
                here.append(key)
            elif self._holdings.has(key, TierName.SSD):
                reads[key] = TierName.SSD
            elif TierName.REMOTE in self._tiers:
                reads[key] = TierName.REMOTE
        return _Classified(here, joined, reads)

    def _begin(self, share: ShareState, blocks: _Classified) -> None:
        """Pin, join, and submit the reads of a share that has got its slots."""
        here, joined, reads = blocks
        for key in (*here, *joined):
            self._pool.pin(key, share.plan)
        by_tier: defaultdict[TierName, list[BlockIO]] = defaultdict(list)
        for key, tier in reads.items():
            self.fills.begin(key, tier, share.sizes.get(key, 0))
            self._pool.pin(key, share.plan)
            by_tier[tier].append(BlockIO(key, self._pool.buffer(key)))
        share.waiting.update(joined, reads)
        for key in share.waiting:
            self.fills.wait(key, share.plan)
        self._stats.count_hits(TierName.DRAM, len(here))
        self._stats.joined_reads_total += len(joined)
        unique = len(set(share.keys))
        self._stats.unavailable_blocks_total += unique - len(here) - len(joined) - len(reads)
        for tier, ios in by_tier.items():
            self._tiers[tier].submit_reads(ios)
        self._pool.resident.touch(share.keys)
        for below in self._tiers.values():
            below.touch(share.keys)
        for key in here:
            self._use(key, TierName.DRAM)
        if not share.waiting:
            self._ready.append(share)

    # ---- blocks that come ---------------------------------------------------------------

    def end_read(self, tier: TierName, completion: Completion) -> int:
        """Returns the bytes that came in."""
        key = completion.key
        if completion.error is None:
            nbytes = self._pool.buffer(key).nbytes
            first = self.fills.first_waiting(key)
            share = self.queue.get(first) if first is not None else None
            if share is not None:
                share.read_bytes[tier] = share.read_bytes.get(tier, 0) + nbytes
            self._stats.count_hits(tier, 1)
            self.end_fill(key, completion.label)
            self._use(key, tier)
            return nbytes
        if tier is TierName.SSD and TierName.REMOTE in self._tiers:
            self.fills.read_elsewhere(key, TierName.REMOTE)
            block = BlockIO(key, self._pool.buffer(key))
            self._tiers[TierName.REMOTE].submit_reads([block])
        else:
            self._stats.unavailable_blocks_total += 1
            self.end_fill(key, None)
        return 0

    def end_fill(self, key: BlockKey, label: BlockLabel | None) -> None:
        """A block has come, or, without a label, nothing has."""
        for plan in self.fills.end(key, label):
            share = self.queue.get(plan)
            assert share is not None, "a released plan waits for nothing"
            share.waiting.discard(key)
            if not share.waiting:
                self._ready.append(share)

    def give_up_fill(self, key: BlockKey) -> None:
        """The block is a miss, though its slot is not free before its fill ends."""
        for plan in self.fills.quarantine(key):
            share = self.queue.get(plan)
            assert share is not None, "a released plan waits for nothing"
            self.fills.stop_waiting(key, plan)
            self._pool.unpin(key, plan)
            share.waiting.discard(key)
            if not share.waiting:
                self._ready.append(share)

    # ---- settlement ---------------------------------------------------------------------

    def move_on(self, now: float) -> None:
        """Settle what has all it can get, or is due, and give slots to who comes next."""
        self._settle_ready(now)
        for share in self.queue.due(now):
            self._end_overdue(share, now)
        self._grant(now)
        self._settle_ready(now)

    def _settle_ready(self, now: float) -> None:
        ready, self._ready = self._ready, []
        for share in ready:
            if share.settled_s is None and self.queue.get(share.plan) is share:
                self._settle(share, now)

    def _end_overdue(self, share: ShareState, now: float) -> None:
        if share.settled_s is None:
            self._stats.expired_plans_total += 1
            self._settle(share, now)
        elif now >= share.settled_s + self._options.hold_s:
            self._stats.forgotten_plans_total += 1
            self.release(share.plan)

    def _settle(self, share: ShareState, now: float) -> None:
        if share.granted_s is None:  # its deadline came first: what is here must do
            for key in share.keys:
                if key in self._pool.resident:
                    self._pool.pin(key, share.plan)
        self._stop_waiting(share)
        in_dram = [self._pool.is_pinned_by(key, share.plan) for key in share.keys]
        granted_s = now if share.granted_s is None else share.granted_s
        queue_s, read_s = granted_s - share.admitted_s, now - granted_s
        self._settled.append(ShareSettled(share.plan, in_dram, share.read_bytes, queue_s, read_s))
        self.queue.mark_settled(share, now, self._options.hold_s)
        if not any(in_dram):
            self.queue.remove(share)

    def _stop_waiting(self, share: ShareState) -> None:
        """Let unfinished fills go on without this plan."""
        for key in share.waiting:
            self.fills.stop_waiting(key, share.plan)
            self._pool.unpin(key, share.plan)
        share.waiting.clear()
