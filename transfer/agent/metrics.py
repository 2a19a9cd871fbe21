"""What an agent reports of itself and of its store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from common.samples import Sample, histogram, sample
from storage.store_events import StoreStats
from storage.tiers.contract import EvictionCause, IoStats, RoomStats, TierStats


class AgentCounters:
    """What the agent itself counts; the store counts the rest."""

    def __init__(self) -> None:
        self.malformed_total = 0
        self._deliveries: Counter[str] = Counter(ok=0, failed=0, cancelled=0)
        self._delivered_bytes: Counter[str] = Counter()
        self._pulls: Counter[str] = Counter(ok=0, failed=0)
        self._pulled_bytes = 0

    def delivered(self, engine: str, outcome: str, nbytes: int) -> None:
        """A delivery has ended; ``outcome`` is "ok", "failed" or "cancelled"."""
        self._deliveries[outcome] += 1
        self._delivered_bytes[engine] += nbytes

    def pulled(self, is_ok: bool, nbytes: int) -> None:
        """A pull has ended."""
        self._pulls["ok" if is_ok else "failed"] += 1
        self._pulled_bytes += nbytes

    def samples(self) -> Iterator[Sample]:
        yield sample("agent_malformed_messages_total", self.malformed_total)
        yield sample("agent_pulled_bytes_total", self._pulled_bytes)
        for outcome, count in self._deliveries.items():
            yield sample("agent_deliveries_total", count, outcome=outcome)
        for engine, nbytes in self._delivered_bytes.items():
            yield sample("agent_delivered_bytes_total", nbytes, engine=engine)
        for outcome, count in self._pulls.items():
            yield sample("agent_pulls_total", count, outcome=outcome)


def store_samples(stats: StoreStats) -> Iterator[Sample]:
    """Everything that the tiered store counts."""
    yield from _plan_samples(stats)
    yield from _dram_samples(stats)
    for tier, of_tier in stats.tiers.items():
        queue_bytes, bytes_per_s = stats.read_queue_bytes[tier], stats.read_bytes_per_s[tier]
        queue_s = queue_bytes / max(bytes_per_s, 1.0)
        yield sample("agent_read_queue_bytes", queue_bytes, tier=tier.value)
        yield sample("agent_read_bytes_per_second", bytes_per_s, tier=tier.value)
        yield sample("agent_read_queue_seconds", queue_s, tier=tier.value)
        yield from _tier_samples(tier.value, of_tier)


def _plan_samples(stats: StoreStats) -> list[Sample]:
    return [
        sample("agent_plans", stats.waiting_plans, state="waiting"),
        sample("agent_plans", stats.reading_plans, state="reading"),
        sample("agent_plans", stats.pinning_plans, state="pinning"),
        sample("agent_joined_reads_total", stats.joined_reads_total),
        sample("agent_unavailable_blocks_total", stats.unavailable_blocks_total),
        sample("agent_expired_plans_total", stats.expired_plans_total),
        sample("agent_forgotten_plans_total", stats.forgotten_plans_total),
        sample("agent_refused_plans_total", stats.refused_plans_total),
        *(sample("agent_hits_total", n, tier=tier.value) for tier, n in stats.hits_total.items()),
    ]


def _dram_samples(stats: StoreStats) -> list[Sample]:
    blocks, slots, slot_bytes = stats.resident_blocks, stats.slots, stats.slot_bytes
    evicted = stats.evicted_blocks_total
    return [
        sample("agent_blocks", stats.volatile_blocks, state="volatile"),
        sample("agent_blocks", stats.durable_blocks, state="durable"),
        sample("agent_persisting_blocks", stats.persisting_blocks),
        sample("agent_skipped_persists_total", stats.skipped_persists_total),
        sample("agent_failed_persists_total", stats.failed_persists_total),
        sample("agent_dram_slots", slots),
        sample("agent_dram_slots_available", stats.slots_available),
        sample("agent_resident_blocks", blocks),
        sample("agent_tier_blocks", blocks, tier="dram"),
        sample("agent_tier_bytes", blocks * slot_bytes, tier="dram"),
        sample("agent_tier_capacity_bytes", slots * slot_bytes, tier="dram"),
        sample("agent_evicted_blocks_total", evicted, tier="dram", cause="capacity"),
    ]


def _tier_samples(tier: str, stats: TierStats) -> Iterator[Sample]:
    """What a tier below DRAM counts."""
    yield from _room_samples(tier, stats.room)
    yield from _io_samples(tier, stats.io)
    if (disks := stats.devices) is not None:
        yield sample("agent_ssd_devices", disks.devices, state="used")
        yield sample("agent_ssd_devices", disks.failed_devices, state="failed")
    if (packs := stats.packs) is not None:
        yield sample("agent_remote_packs", packs.packs)
        yield sample("agent_remote_unreadable_packs_total", packs.unreadable_packs_total)
        yield sample("agent_remote_hedged_reads_total", packs.hedged_reads_total)


def _room_samples(tier: str, room: RoomStats) -> list[Sample]:
    evicted = room.evictions_total
    return [
        sample("agent_tier_bytes", room.used_bytes, tier=tier),
        sample("agent_tier_capacity_bytes", room.capacity_bytes, tier=tier),
        sample("agent_tier_blocks", room.blocks, tier=tier),
        *(
            sample("agent_evicted_blocks_total", evicted.get(c, 0), tier=tier, cause=c.value)
            for c in EvictionCause
        ),
    ]


def _io_samples(tier: str, io: IoStats) -> list[Sample]:
    return [
        sample("agent_tier_write_queue_bytes", io.write_queue_bytes, tier=tier),
        sample("agent_tier_blocks_in_flight", io.reads_in_flight, tier=tier, kind="read"),
        sample("agent_tier_blocks_in_flight", io.writes_in_flight, tier=tier, kind="write"),
        sample("agent_tier_hits_total", io.hits_total, tier=tier),
        sample("agent_storage_read_bytes_total", io.read_bytes_total, tier=tier),
        sample("agent_storage_write_bytes_total", io.write_bytes_total, tier=tier),
        sample("agent_storage_read_errors_total", io.read_errors_total, tier=tier),
        sample("agent_storage_write_errors_total", io.write_errors_total, tier=tier),
        sample("agent_storage_retries_total", io.retries_total, tier=tier),
        sample("agent_corrupt_blocks_total", io.corrupt_blocks_total, tier=tier),
        sample("agent_missing_blocks_total", io.missing_blocks_total, tier=tier),
        sample("agent_other_version_blocks_total", io.other_version_blocks_total, tier=tier),
        histogram("agent_storage_read_seconds", io.read_latency, tier=tier),
        histogram("agent_storage_write_seconds", io.write_latency, tier=tier),
    ]
