"""DRAM slots over an SSD tier over a remote tier, driven by one thread's loop.

Nothing here waits: work is submitted to the tiers, and ``poll`` moves it on. The
caller passes the time (seconds of any one clock), so that tests and simulations can.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from common.block import UNLABELLED, BlockKey, BlockLabel, TierName
from common.ids import PlanId
from common.messages.from_agents import Holding
from common.rate import RateMeter
from storage.index.holdings import Holdings
from storage.index.owners import Selector
from storage.share_reads import NO_SIZES, ShareReads
from storage.slot_pool import SlotPool
from storage.store_events import StoreEvent, StoreStats
from storage.store_options import StoreOptions
from storage.tiers.contract import Tier
from storage.write_behind import WriteBehind


class TieredStore:
    """Has plans' blocks in DRAM when they are needed, and persists new ones behind.

    *Reading.* Shares get their slots in the order of their plans, each all at once, and
    only then are read: SSD before remote, a failed SSD read again from remote. A block is
    read once while it stays in DRAM, however many plans want it. What is settled stays
    pinned until the plan is released, at most ``hold_s``.

    *Persisting.* ``reserve`` a slot, fill it, ``commit`` it: the block is resident, and is
    written to SSD and remote behind. While a plan waits for slots, persisting leaves
    as many unpinned as that plan wants, so that neither starves the other. Where there
    is no slot or no room in the write queue, the block is skipped and counted.

    Raises ValueError for a policy that is none.
    """

    def __init__(
        self,
        pool: SlotPool,
        ssd: Tier | None,
        remote: Tier | None,
        options: StoreOptions | None = None,
    ) -> None:
        options = options or StoreOptions()
        self.pool = pool
        self._tiers = {tier.name: tier for tier in (ssd, remote) if tier is not None}
        self._keep_in_dram = options.keep_in_dram
        self._holdings = Holdings()
        self._stats = StoreStats(slots=pool.num_slots)
        self._reads = ShareReads(pool, self._tiers, self._holdings, options, self._stats, self._use)
        self._writes = WriteBehind(pool, self._tiers, self._holdings, options)
        self._skipped = 0
        """Blocks that were not persisted for want of a slot."""
        self._rates = {name: RateMeter() for name in self._tiers}
        for name, tier in self._tiers.items():
            for key in tier.keys():
                self._holdings.change(Holding(key, name, True))
        self._holdings.take_changes()  # known from the start

    # ---- plans ----------------------------------------------------------------------

    def admit(
        self,
        plan: PlanId,
        keys: Sequence[BlockKey],
        deadline: float,
        now: float,
        sizes: Mapping[BlockKey, int] = NO_SIZES,
    ) -> None:
        """Queue a plan's share; ShareSettled follows, by ``deadline`` at the latest.

        ``sizes``: bytes of those that do not fill a slot, at most so many.
        A plan that is here already is ignored; one that does not fit the queue settles
        at once with nothing.
        """
        self._reads.admit(plan, keys, deadline, now, sizes)

    def release(self, plan: PlanId) -> None:
        """The plan needs its blocks no more, settled or not. Unknown plans are ignored."""
        self._reads.release(plan)

    # ---- blocks from engines ----------------------------------------------------------

    def reserve(self, keys: Iterable[BlockKey], nbytes: int = 0) -> dict[BlockKey, int]:
        """Slots (byte offsets) for those of the blocks, each of ``nbytes`` (0: a slot's), that are
        new to this store.

        Each must be ended by :meth:`commit` or :meth:`abandon`. Blocks that are held,
        or on their way, are left out; so are, counted, those without a slot.
        """
        fills, offsets = self._reads.fills, {}
        for key in keys:
            if key in fills or self._holdings.has_any(key):
                continue
            if not self.pool.available or not self._may_persist():
                self._skipped += 1
                continue
            fills.begin(key, None, nbytes)
            offsets[key] = self.pool.offset(key)
        return offsets

    def commit(
        self,
        key: BlockKey,
        label: BlockLabel = UNLABELLED,
        replaced: Sequence[BlockKey] = (),
        is_branch: bool = False,
    ) -> None:
        """A reserved slot holds the block's bytes: it is resident, and written behind.

        ``replaced``: those for which it stands, of which room is made first. ``is_branch``: it
        counts as used once more."""
        self._reads.fills.check_pulled(key)
        self._reads.end_fill(key, label)
        if replaced or is_branch:
            used = [key] if is_branch else []
            self.pool.resident.touch(used, replaced)
            for tier in self._tiers.values():
                tier.touch(used, replaced)
        self._writes.start(key, self._writes.targets_of_new())

    def abandon(self, key: BlockKey) -> None:
        """Nothing came, or will come, into a reserved slot: it is free."""
        self._reads.fills.check_pulled(key)
        self._reads.end_fill(key, None)

    def quarantine(self, key: BlockKey) -> None:
        """Nothing counts that comes into a reserved slot, which may not be reused before
        :meth:`abandon`: the block is a miss."""
        self._reads.give_up_fill(key)

    def _may_persist(self) -> bool:
        """May one more slot be pinned by persisting?"""
        pinned = self._reads.fills.pulls + len(self._writes)
        return pinned < self.pool.num_slots - self._reads.slots_wanted

    def _use(self, key: BlockKey, found_in: TierName) -> None:
        targets = self._writes.targets_of_use(key, found_in)
        if targets and self._may_persist():
            self._writes.start(key, targets)
        else:
            self._skipped += bool(targets)

    def drop(self, selector: Selector, shared: bool = True) -> None:
        """Forget all blocks of these owners, on every tier, but for those that plans have
        pinned in DRAM. ``shared``: also in the remote tier, for all who share it."""
        for name, tier in self._tiers.items():
            if shared or name is not TierName.REMOTE:
                tier.drop(selector)
        self._have_left_dram(self.pool.drop(selector))

    def _have_left_dram(self, keys: Iterable[BlockKey]) -> None:
        for key in keys:
            self._holdings.change(Holding(key, TierName.DRAM, False))

    # ---- progress ---------------------------------------------------------------------

    def poll(self, now: float) -> list[StoreEvent]:
        """Move everything on, and return what happened since the last call: first what came
        and went, then which shares settled.

        Call it when a tier wakes the owner, after messages were handled (admit and
        commit report here as well), and now and then for deadlines.
        """
        for name, tier in self._tiers.items():
            completions, read_bytes = tier.poll(), 0
            for change in tier.take_changes():
                self._holdings.change(change)
            for selector in tier.take_drops():
                self._have_left_dram(self.pool.drop(selector))
            for completion in completions:
                if completion.is_write:
                    self._stats.failed_persists_total += completion.error is not None
                    self._writes.end(completion.key, name)
                else:
                    read_bytes += self._reads.end_read(name, completion)
            self._rates[name].note(now, read_bytes, self._reads.fills.reads[name] > 0)
        self._reads.move_on(now)
        if not self._keep_in_dram:
            self._have_left_dram(self.pool.evict(list(self.pool.resident)))
        return [*self._holdings.take_changes(), *self._reads.take_settled()]

    # ---- questions --------------------------------------------------------------------

    def is_resident(self, keys: Iterable[BlockKey]) -> list[bool]:
        """Which blocks are in DRAM now; only pinned ones stay there."""
        return [self._holdings.has(key, TierName.DRAM) for key in keys]

    def holdings(self) -> list[Holding]:
        """Everything held, for an announcement from scratch.

        Events that ``poll`` has not returned yet are in it already, and harmless after it.
        """
        return [Holding(key, tier, True) for key, tier in self._holdings]

    def stats(self) -> StoreStats:
        """Present counters; a copy."""
        stats, fills = self._stats, self._reads.fills
        stats.skipped_persists_total = self._skipped + self._writes.skipped_total
        stats.persisting_blocks = fills.pulls + len(self._writes)
        stats.evicted_blocks_total = fills.evicted_blocks_total
        rates = {name: rate.bytes_per_s for name, rate in self._rates.items()}
        tiers = {name: tier.stats() for name, tier in self._tiers.items()}
        return stats.snapshot(self.pool, self._holdings, self._reads.queue, tiers, rates)

    def close(self) -> None:
        """End the tiers' I/O within seconds; blocks not yet durable are lost."""
        for tier in self._tiers.values():
            tier.close()
