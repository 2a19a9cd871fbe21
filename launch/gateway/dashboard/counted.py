"""What agents and engines have counted, as operators are shown it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TypedDict

from common.metrics import METRICS
from common.samples import Latencies, Sample

LOOPBACK = "lo"

Counts = Counter[tuple[str, str]]
"""By group and name: ("bytes", "remote_read"), ("hits", "ssd"), ("delivered_bytes", "d0")."""


class TierView(TypedDict):
    """One tier of one agent; ``hits_total`` are blocks of plans that were found there."""

    bytes: int
    capacity_bytes: int
    blocks: int
    write_queue_bytes: int
    hits_total: int


_OF_TIER = {
    "agent_tier_bytes": "bytes",
    "agent_tier_capacity_bytes": "capacity_bytes",
    "agent_tier_blocks": "blocks",
    "agent_tier_write_queue_bytes": "write_queue_bytes",
    "agent_hits_total": "hits_total",
}


def tiers(samples: Iterable[Sample]) -> dict[str, TierView]:
    """Of one agent, by tier; one that is switched off has no capacity and is left out."""
    found: dict[str, dict[str, int]] = {}
    for name, labels, value in _known(samples):
        if name in _OF_TIER:
            found.setdefault(labels["tier"], {})[_OF_TIER[name]] = int(value)
    return {
        tier: {
            "bytes": values.get("bytes", 0),
            "capacity_bytes": values.get("capacity_bytes", 0),
            "blocks": values.get("blocks", 0),
            "write_queue_bytes": values.get("write_queue_bytes", 0),
            "hits_total": values.get("hits_total", 0),
        }
        for tier, values in found.items()
        if "capacity_bytes" in values
    }


def counts(samples: Iterable[Sample]) -> Counts:
    """Counters of one process. Each byte is counted where the process runs that moves it."""
    found: Counts = Counter()
    for name, labels, value in _known(samples):
        match name:
            case "agent_storage_read_bytes_total":
                found["bytes", f"{labels['tier']}_read"] += int(value)
            case "agent_storage_write_bytes_total":
                found["bytes", f"{labels['tier']}_written"] += int(value)
            case "agent_moved_bytes_total" | "engine_moved_bytes_total":
                found["bytes", _way(labels)] += int(value)
            case "agent_hits_total":
                found["hits", labels["tier"]] += int(value)
            case "agent_delivered_bytes_total":
                found["delivered_bytes", labels["engine"]] += int(value)
    return found


def _way(labels: dict[str, str]) -> str:
    if labels["nic"] == LOOPBACK:
        return "local"
    return "sent" if labels["operation"] == "write" else "fetched"


def grown(now: Counts, before: Counts) -> Counts:
    """What has been counted since; a counter that is smaller than before began anew."""
    return Counter(
        {
            name: value - before[name] if value >= before[name] else value
            for name, value in now.items()
            if value != before[name]
        }
    )


def _known(samples: Iterable[Sample]) -> Iterator[tuple[str, dict[str, str], float]]:
    """Numbers that are declared here, with their labels."""
    for sample in samples:
        if sample.declared() is not None and not isinstance(sample.value, Latencies):
            labels = METRICS[sample.metric].labels
            yield sample.metric, dict(zip(labels, sample.labels, strict=True)), sample.value
