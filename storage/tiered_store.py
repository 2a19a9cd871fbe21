"""DRAM slots over an SSD tier over a remote tier, driven by one thread's loop.

Nothing here waits: work is submitted to the tiers, and ``poll`` moves it on. The
caller passes the time (seconds of any one clock), so that tests and simulations can.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from common.block import UNLABELLED, BlockKey, BlockLabel, TierName
from common.ids import PlanId
from common.messages import Holding
from common.rate import RateMeter
from storage.index.holdings import Holdings
from storage.index.owners import Selector
from storage.read_share import Fill, ReadShare, ShareBook
from storage.slot_pool import SlotPool
from storage.store_events import ShareSettled, StoreEvent, StoreStats
from storage.tiers.contract import BlockIO, Completion, Tier
from storage.write_behind import WriteBehind


class TieredStore:
    """Has plans' blocks in DRAM when they are needed, and persists new ones behind.

    *Reading.* Shares get their slots in the order of their arrival, each all at once, and
    only then are read: SSD before remote, a failed SSD read again from remote. A block is
    read once while it stays in DRAM, however many plans want it. What is settled stays
    pinned until the plan is released, at most ``hold_s``.

    *Persisting.* ``reserve`` a slot, fill it, ``commit`` it: the block is resident, and is
    written to SSD and remote behind. While a plan waits for slots, persisting leaves
    as many unpinned as that plan wants, so that neither starves the other. Where there
    is no slot or no room in the write queue, the block is skipped and counted.

    ``keep_in_dram=False``: what nobody needs is dropped at once, so every hit is read.
    The policies are named in :mod:`storage.write_behind`; ValueError for another name.
    """

    def __init__(
        self,
        pool: SlotPool,
        ssd: Tier | None,
        remote: Tier | None,
        *,
        write_queue_blocks: int = 1024,
        plans_max: int = 4096,
        hold_s: float = 600.0,
        keep_in_dram: bool = True,
        write_policy: str = "everywhere",
        promotion_policy: str = "always",
    ) -> None:
        self.pool = pool
        self._tiers = {tier.name: tier for tier in (ssd, remote) if tier is not None}
        self._plans_max = plans_max
        self._hold_s = hold_s
        self._keep_in_dram = keep_in_dram
        self._shares = ShareBook()
        self._fills: dict[BlockKey, Fill] = {}
        self._pulls = 0
        """Fills from engines."""
        self._skipped = 0
        """Blocks that were not persisted for want of a slot."""
        self._ready: list[ReadShare] = []
        """Shares that wait for nothing more."""
        self._holdings = Holdings()
        self._writes = WriteBehind(
            *(pool, self._tiers, self._holdings, write_queue_blocks),
            *(write_policy, promotion_policy),
        )
        self._events: list[StoreEvent] = []
        self._rates = {name: RateMeter() for name in self._tiers}
        self._reads: Counter[TierName] = Counter()
        self._stats = StoreStats(slots=pool.num_slots)
        for name, tier in self._tiers.items():
            for key in tier.keys():
                self._holdings.change(key, name, True)

    # ---- plans ----------------------------------------------------------------------

    def admit(self, plan: PlanId, keys: Sequence[BlockKey], deadline: float, now: float) -> None:
        """Queue a plan's share; ShareSettled follows, by ``deadline`` at the latest.

        A plan that is here already is ignored; one that does not fit the queue settles
        at once with nothing.
        """
        if plan in self._shares:
            self._stats.refused_plans_total += 1
            return
        if self._shares.queued >= self._plans_max:
            self._stats.refused_plans_total += 1
            self._events.append(ShareSettled(plan, [False] * len(keys), {}, 0.0, 0.0))
            return
        share = ReadShare(plan, list(keys), deadline, now)
        share.promised_blocks.update(
            TierName.SSD if self._holdings.has(key, TierName.SSD) else TierName.REMOTE
            for key in keys
            if not self._holdings.has(key, TierName.DRAM) and key not in self._fills
        )
        self._shares.enqueue(share)
        self._grant(now)

    def release(self, plan: PlanId) -> None:
        """The plan needs its blocks no more, settled or not. Unknown plans are ignored."""
        if (share := self._shares.get(plan)) is None:
            return
        self._stop_waiting(share)
        self.pool.unpin_all(plan)
        self._shares.remove(share)

    def _grant(self, now: float) -> None:
        """Give slots to the queue's head, and so on, until they do not suffice."""
        while (share := self._shares.head()) is not None:
            if self.pool.available < share.unpinned_slots_wanted:
                return  # nothing that matters has changed since it was last looked at
            here, joined, reads = self._classify(share)
            wanted = len(reads) + sum(self.pool.is_evictable(key) for key in here)
            if wanted > self.pool.available:
                share.unpinned_slots_wanted = wanted
                return
            self._shares.dequeue(share)
            share.granted_s = now
            self._begin(share, here, joined, reads)

    def _classify(
        self, share: ReadShare
    ) -> tuple[list[BlockKey], list[BlockKey], dict[BlockKey, TierName]]:
        """The leading blocks that fit the pool: in DRAM, being filled, to be read."""
        here: list[BlockKey] = []
        joined: list[BlockKey] = []
        reads: dict[BlockKey, TierName] = {}
        for key in dict.fromkeys(share.keys):
            if len(here) + len(joined) + len(reads) == self.pool.num_slots:
                break
            if key in self._fills:
                joined.append(key)
            elif self._holdings.has(key, TierName.DRAM):
                here.append(key)
            elif self._holdings.has(key, TierName.SSD):
                reads[key] = TierName.SSD
            elif TierName.REMOTE in self._tiers:
                reads[key] = TierName.REMOTE
        return here, joined, reads

    def _begin(
        self,
        share: ReadShare,
        here: list[BlockKey],
        joined: list[BlockKey],
        reads: dict[BlockKey, TierName],
    ) -> None:
        """Pin, join, and submit the reads of a share that has got its slots."""
        for key in (*here, *joined):
            self.pool.pin(key, share.plan)
        by_tier: defaultdict[TierName, list[BlockIO]] = defaultdict(list)
        for key, tier in reads.items():
            self._begin_fill(key, tier)
            self.pool.pin(key, share.plan)
            by_tier[tier].append(BlockIO(key, self.pool.buffer(key)))
        share.waiting.update(joined, reads)
        for key in share.waiting:
            self._fills[key].plans.add(share.plan)
        self._count_hit(TierName.DRAM, len(here))
        self._stats.joined_reads_total += len(joined)
        unique = len(set(share.keys))
        self._stats.unavailable_blocks_total += unique - len(here) - len(joined) - len(reads)
        for tier, blocks in by_tier.items():
            self._tiers[tier].submit_reads(blocks)
        self.pool.touch(share.keys)
        for below in self._tiers.values():
            below.touch(share.keys)
        for key in here:
            self._use(key, TierName.DRAM)
        if not share.waiting:
            self._ready.append(share)

    def _stop_waiting(self, share: ReadShare) -> None:
        """Let unfinished fills go on without this plan."""
        for key in share.waiting:
            self._fills[key].plans.discard(share.plan)
            self.pool.unpin(key, share.plan)
        share.waiting.clear()

    def _settle(self, share: ReadShare, now: float) -> None:
        if share.granted_s is None:  # its deadline came first: what is here must do
            for key in share.keys:
                if self.pool.is_resident(key):
                    self.pool.pin(key, share.plan)
        self._stop_waiting(share)
        in_dram = [self.pool.is_pinned_by(key, share.plan) for key in share.keys]
        granted_s = now if share.granted_s is None else share.granted_s
        queue_s, read_s = granted_s - share.admitted_s, now - granted_s
        self._events.append(ShareSettled(share.plan, in_dram, share.read_bytes, queue_s, read_s))
        self._shares.mark_settled(share, now, self._hold_s)
        if not any(in_dram):
            self._shares.remove(share)

    # ---- blocks from engines ----------------------------------------------------------

    def reserve(self, keys: Iterable[BlockKey]) -> dict[BlockKey, int]:
        """Slots (byte offsets) for those of the blocks that are new to this store.

        Each must be ended by :meth:`commit` or :meth:`abandon`. Blocks that are held,
        or on their way, are left out; so are, counted, those without a slot.
        """
        offsets = {}
        for key in keys:
            if key in self._fills or self._holdings.has_any(key):
                continue
            if not self.pool.available or not self._may_persist():
                self._skipped += 1
                continue
            self._begin_fill(key, None)
            self._pulls += 1
            offsets[key] = self.pool.offset(key)
        return offsets

    def commit(self, key: BlockKey, label: BlockLabel = UNLABELLED) -> None:
        """A reserved slot holds the block's bytes: it is resident, and written behind."""
        self._end_pull(key, label)
        self._writes.start(key, self._writes.targets_of_new())

    def abandon(self, key: BlockKey) -> None:
        """Nothing came, or will come, into a reserved slot: it is free."""
        self._end_pull(key, None)

    def _end_pull(self, key: BlockKey, label: BlockLabel | None) -> None:
        fill = self._fills.get(key)
        if fill is None or fill.tier is not None:
            raise KeyError(f"block {key.hex()} is not reserved")
        self._pulls -= 1
        self._end_fill(key, label)

    def _may_persist(self) -> bool:
        """May one more slot be pinned by persisting?"""
        head = self._shares.head()
        reserved = head.unpinned_slots_wanted if head is not None else 0
        return self._pulls + len(self._writes) < self.pool.num_slots - reserved

    def _use(self, key: BlockKey, found_in: TierName) -> None:
        targets = self._writes.targets_of_use(key, found_in)
        if targets and self._may_persist():
            self._writes.start(key, targets)
        else:
            self._skipped += bool(targets)

    def drop(self, selector: Selector) -> None:
        """Forget all blocks of these owners, on every tier, but for those that plans have
        pinned in DRAM."""
        for tier in self._tiers.values():
            tier.drop(selector)
        self._drop_in_dram(selector)

    def _drop_in_dram(self, selector: Selector) -> None:
        for key in self.pool.drop(selector):
            self._note(Holding(key, TierName.DRAM, False))

    # ---- progress ---------------------------------------------------------------------

    def poll(self, now: float) -> list[StoreEvent]:
        """Move everything on, and return what happened since the last call.

        Call it when a tier wakes the owner, after messages were handled (admit and
        commit report here as well), and now and then for deadlines.
        """
        for name, tier in self._tiers.items():
            completions, read_bytes = tier.poll(), 0
            for change in tier.take_changes():
                self._note(change)
            for selector in tier.take_drops():
                self._drop_in_dram(selector)
            for completion in completions:
                if completion.is_write:
                    self._stats.failed_persists_total += completion.error is not None
                    self._writes.end(completion.key, name)
                else:
                    read_bytes += self._end_read(name, completion)
            self._rates[name].note(now, read_bytes, self._reads[name] > 0)
        self._settle_ready(now)
        for share in self._shares.due(now):
            self._end_overdue(share, now)
        self._grant(now)
        self._settle_ready(now)
        if not self._keep_in_dram:
            for key in self.pool.evict_all():
                self._note(Holding(key, TierName.DRAM, False))
        events, self._events = self._events, []
        return events

    def _settle_ready(self, now: float) -> None:
        ready, self._ready = self._ready, []
        for share in ready:
            if share.settled_s is None and self._shares.get(share.plan) is share:
                self._settle(share, now)

    def _end_overdue(self, share: ReadShare, now: float) -> None:
        if share.settled_s is None:
            self._stats.expired_plans_total += 1
            self._settle(share, now)
        elif now >= share.settled_s + self._hold_s:
            self._stats.forgotten_plans_total += 1
            self.release(share.plan)

    def _begin_fill(self, key: BlockKey, tier: TierName | None) -> None:
        if (evicted := self.pool.begin_fill(key)) is not None:
            self._stats.evicted_blocks_total += 1
            self._note(Holding(evicted, TierName.DRAM, False))
        self._fills[key] = Fill(tier)
        if tier is not None:
            self._reads[tier] += 1

    def _end_fill(self, key: BlockKey, label: BlockLabel | None) -> None:
        """Without a label nothing came."""
        fill = self._fills.pop(key)
        if label is not None:
            self.pool.commit(key, label)
            self._note(Holding(key, TierName.DRAM, True))
        else:
            self.pool.abandon(key)
        for plan in sorted(fill.plans):
            share = self._shares.get(plan)
            assert share is not None, "a released plan waits for nothing"
            share.waiting.discard(key)
            if not share.waiting:
                self._ready.append(share)

    def _end_read(self, tier: TierName, completion: Completion) -> int:
        """Returns the bytes that came in."""
        key = completion.key
        fill = self._fills[key]
        self._reads[tier] -= 1
        if completion.error is None:
            nbytes = self.pool.block_bytes
            first = self._shares.get(min(fill.plans)) if fill.plans else None
            if first is not None:
                first.read_bytes[tier] = first.read_bytes.get(tier, 0) + nbytes
            self._count_hit(tier, 1)
            self._end_fill(key, completion.label)
            self._use(key, tier)
            return nbytes
        if tier is TierName.SSD and TierName.REMOTE in self._tiers:
            fill.tier = TierName.REMOTE
            self._reads[TierName.REMOTE] += 1
            block = BlockIO(key, self.pool.buffer(key))
            self._tiers[TierName.REMOTE].submit_reads([block])
        else:
            self._stats.unavailable_blocks_total += 1
            self._end_fill(key, None)
        return 0

    def _note(self, change: Holding) -> None:
        if self._holdings.change(change.key, change.tier, change.held):
            self._events.append(change)

    def _count_hit(self, tier: TierName, blocks: int) -> None:
        hits = self._stats.hits_total
        hits[tier] = hits.get(tier, 0) + blocks

    # ---- questions --------------------------------------------------------------------

    def is_resident(self, keys: Iterable[BlockKey]) -> list[bool]:
        """Which blocks are in DRAM now; only pinned ones stay there."""
        return [self._holdings.has(key, TierName.DRAM) for key in keys]

    def offset(self, key: BlockKey) -> int:
        """Where the block lies in DRAM, for its delivery; KeyError if it is not there."""
        if not self.pool.is_resident(key):
            raise KeyError(f"block {key.hex()} is not in DRAM")
        return self.pool.offset(key)

    def offsets(self, keys: Sequence[BlockKey]) -> NDArray[np.int64]:
        """:meth:`offset` of each block; shape (len(keys),)."""
        for key in keys:
            self.offset(key)
        return self.pool.offsets(keys)

    def holdings(self) -> list[Holding]:
        """Everything held, for an announcement from scratch. Events that ``poll`` has not
        returned yet are in it already, and harmless after it."""
        return [Holding(key, tier, True) for key, tier in self._holdings]

    def stats(self) -> StoreStats:
        """Present counters; a copy."""
        stats = self._stats
        stats.skipped_persists_total = self._skipped + self._writes.skipped_total
        stats.persisting_blocks = self._pulls + len(self._writes)
        rates = {name: rate.bytes_per_s for name, rate in self._rates.items()}
        tiers = {name: tier.stats() for name, tier in self._tiers.items()}
        return stats.snapshot(self.pool, self._holdings, self._shares, tiers, rates)

    def close(self) -> None:
        """End the tiers' I/O within seconds; blocks not yet durable are lost."""
        for tier in self._tiers.values():
            tier.close()
