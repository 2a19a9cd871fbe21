"""An agent's counters and gauges, as ready Prometheus samples."""

from __future__ import annotations

from collections import Counter

from common.block import TierName
from storage.store_events import StoreStats
from storage.tiers.contract import EvictionCause, TierStats

Samples = dict[str, float]


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

    def samples(self) -> Samples:
        """Sample name, with labels, -> value."""
        samples: Samples = {
            "dualpath:agent_malformed_messages_total": self.malformed_total,
            "dualpath:agent_pulled_bytes_total": self._pulled_bytes,
        }
        for name, counter, label in (
            ("deliveries", self._deliveries, "outcome"),
            ("delivered_bytes", self._delivered_bytes, "engine"),
            ("pulls", self._pulls, "outcome"),
        ):
            for value, count in counter.items():
                samples[f'dualpath:agent_{name}_total{{{label}="{value}"}}'] = count
        return samples


def store_samples(stats: StoreStats) -> Samples:
    """Everything that the tiered store counts."""
    samples: Samples = {
        'dualpath:agent_blocks{state="volatile"}': stats.volatile_blocks,
        'dualpath:agent_blocks{state="durable"}': stats.durable_blocks,
        "dualpath:agent_dram_slots": stats.slots,
        "dualpath:agent_dram_slots_available": stats.slots_available,
        "dualpath:agent_resident_blocks": stats.resident_blocks,
        "dualpath:agent_persisting_blocks": stats.persisting_blocks,
        'dualpath:agent_plans{state="waiting"}': stats.waiting_plans,
        'dualpath:agent_plans{state="reading"}': stats.reading_plans,
        'dualpath:agent_plans{state="pinning"}': stats.pinning_plans,
        'dualpath:agent_evicted_blocks_total{tier="dram",cause="capacity"}': (
            stats.evicted_blocks_total
        ),
        'dualpath:agent_tier_blocks{tier="dram"}': stats.resident_blocks,
        'dualpath:agent_tier_bytes{tier="dram"}': stats.resident_blocks * stats.slot_bytes,
        'dualpath:agent_tier_capacity_bytes{tier="dram"}': stats.slots * stats.slot_bytes,
    }
    for name in (
        "joined_reads",
        "unavailable_blocks",
        "expired_plans",
        "forgotten_plans",
        "refused_plans",
        "skipped_persists",
        "failed_persists",
    ):
        samples[f"dualpath:agent_{name}_total"] = getattr(stats, f"{name}_total")
    for tier, hits in stats.hits_total.items():
        samples[f'dualpath:agent_hits_total{{tier="{tier.value}"}}'] = hits
    for tier, of in stats.tiers.items():
        queue_bytes, bytes_per_s = stats.read_queue_bytes[tier], stats.read_bytes_per_s[tier]
        label = f'{{tier="{tier.value}"}}'
        samples |= {
            f"dualpath:agent_read_queue_bytes{label}": queue_bytes,
            f"dualpath:agent_read_bytes_per_second{label}": bytes_per_s,
            f"dualpath:agent_read_queue_seconds{label}": queue_bytes / max(bytes_per_s, 1.0),
            **_tier_samples(tier, of),
        }
    return samples


def _tier_samples(tier: TierName, stats: TierStats) -> Samples:
    """What one tier below DRAM counts."""
    label = f'tier="{tier.value}"'
    samples: Samples = {
        f"dualpath:agent_tier_bytes{{{label}}}": stats.used_bytes,
        f"dualpath:agent_tier_capacity_bytes{{{label}}}": stats.capacity_bytes,
        f"dualpath:agent_tier_blocks{{{label}}}": stats.blocks,
        f"dualpath:agent_tier_write_queue_bytes{{{label}}}": stats.write_queue_bytes,
        f'dualpath:agent_tier_blocks_in_flight{{{label},kind="read"}}': stats.reads_in_flight,
        f'dualpath:agent_tier_blocks_in_flight{{{label},kind="write"}}': stats.writes_in_flight,
        f"dualpath:agent_tier_hits_total{{{label}}}": stats.hits_total,
        f"dualpath:agent_storage_read_bytes_total{{{label}}}": stats.read_bytes_total,
        f"dualpath:agent_storage_write_bytes_total{{{label}}}": stats.write_bytes_total,
        f"dualpath:agent_storage_read_errors_total{{{label}}}": stats.read_errors_total,
        f"dualpath:agent_storage_write_errors_total{{{label}}}": stats.write_errors_total,
        f"dualpath:agent_storage_retries_total{{{label}}}": stats.retries_total,
        f"dualpath:agent_corrupt_blocks_total{{{label}}}": stats.corrupt_blocks_total,
        f"dualpath:agent_missing_blocks_total{{{label}}}": stats.missing_blocks_total,
        f"dualpath:agent_other_version_blocks_total{{{label}}}": stats.other_version_blocks_total,
        **stats.read_latency.samples("dualpath:agent_storage_read_seconds", label),
        **stats.write_latency.samples("dualpath:agent_storage_write_seconds", label),
    }
    for cause in EvictionCause:
        count = stats.evictions_total.get(cause, 0)
        name = f'dualpath:agent_evicted_blocks_total{{{label},cause="{cause.value}"}}'
        samples[name] = count
    if tier is TierName.SSD:
        samples |= {
            'dualpath:agent_ssd_devices{state="used"}': stats.devices,
            'dualpath:agent_ssd_devices{state="failed"}': stats.failed_devices,
        }
    if tier is TierName.REMOTE:
        samples |= {
            "dualpath:agent_remote_packs": stats.packs,
            "dualpath:agent_remote_unreadable_packs_total": stats.unreadable_packs_total,
            "dualpath:agent_remote_hedged_reads_total": stats.hedged_reads_total,
        }
    return samples
