"""What the tiered store reports: events for its owner's loop, counters for metrics."""

from __future__ import annotations

import msgspec

from common.block import TierName
from common.ids import PlanId
from common.messages.from_agents import Holding
from storage.index.holdings import Holdings
from storage.share_queue import ShareQueue
from storage.slot_pool import SlotPool
from storage.tiers.contract import TierStats


class ShareSettled(msgspec.Struct, frozen=True):
    """A plan's share is as good as it gets: ``in_dram[i]`` tells that its block i is in
    DRAM and pinned until the plan is released."""

    plan: PlanId
    in_dram: list[bool]
    read_bytes: dict[TierName, int]
    """Read for this plan; a block that several plans waited for counts for the first."""
    queue_s: float
    """Waited for DRAM slots."""
    read_s: float


StoreEvent = ShareSettled | Holding


class StoreStats(msgspec.Struct):
    """Counters (``_total``) and gauges; every one becomes a metric."""

    slots: int = 0
    slot_bytes: int = 0
    slots_available: int = 0
    """Free or evictable now."""
    resident_blocks: int = 0
    volatile_blocks: int = 0
    """In DRAM only."""
    durable_blocks: int = 0
    """On SSD or remote or both."""
    waiting_plans: int = 0
    """Admitted, and not yet given their slots."""
    reading_plans: int = 0
    pinning_plans: int = 0
    """Settled, and not yet released."""
    persisting_blocks: int = 0
    """Being pulled out of an engine, or written behind."""
    read_queue_bytes: dict[TierName, int] = {}
    """Promised to plans and not read yet."""
    read_bytes_per_s: dict[TierName, float] = {}
    """Exponential average while reads were outstanding; 0 until something was read."""
    hits_total: dict[TierName, int] = {}
    """Blocks of plans, by the tier where they were found."""
    joined_reads_total: int = 0
    """Blocks of plans that were being read for another plan, or pulled, already."""
    unavailable_blocks_total: int = 0
    """Blocks of plans that no tier could give, or that exceed DRAM as a whole."""
    expired_plans_total: int = 0
    """Settled by their deadline."""
    forgotten_plans_total: int = 0
    """Released by the store because nobody else did."""
    refused_plans_total: int = 0
    """Not queued: the queue was full, or the plan was known already."""
    evicted_blocks_total: int = 0
    """From DRAM."""
    skipped_persists_total: int = 0
    """Not pulled or not written for want of a slot or of room in the write queue."""
    failed_persists_total: int = 0
    """Writes to SSD or remote that ended with an error."""
    tiers: dict[TierName, TierStats] = {}

    def count_hits(self, tier: TierName, blocks: int) -> None:
        """So many more were found in a tier."""
        self.hits_total[tier] = self.hits_total.get(tier, 0) + blocks

    def snapshot(
        self,
        pool: SlotPool,
        holdings: Holdings,
        shares: ShareQueue,
        tiers: dict[TierName, TierStats],
        rates: dict[TierName, float],
    ) -> StoreStats:
        """A copy with the gauges of the store's parts."""
        queues = {
            name: tier.io.read_queue_bytes + shares.promised_blocks[name] * pool.block_bytes
            for name, tier in tiers.items()
        }
        return msgspec.structs.replace(
            self,
            hits_total=dict(self.hits_total),
            slot_bytes=pool.slot_bytes,
            slots_available=pool.available,
            resident_blocks=len(pool.resident),
            volatile_blocks=holdings.volatile,
            durable_blocks=holdings.durable,
            waiting_plans=shares.queued,
            reading_plans=shares.reading,
            pinning_plans=shares.settled,
            read_queue_bytes=queues,
            read_bytes_per_s=rates,
            tiers=tiers,
        )
