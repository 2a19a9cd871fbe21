"""What agents and engines have counted, as operators are shown it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypedDict

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
"""Metrics whose one label is the tier."""


def tiers(samples: Iterable[Sample]) -> dict[str, TierView]:
    """Of one agent, by tier; one that is switched off has no capacity and is left out."""
    found: dict[str, dict[str, int]] = {}
    for sample in samples:
        if sample.metric in _OF_TIER and (value := _number(sample)) is not None:
            found.setdefault(sample.labels[0], {})[_OF_TIER[sample.metric]] = value
    return {
        tier: {
            "bytes": values.get("bytes", 0),
            "capacity_bytes": values["capacity_bytes"],
            "blocks": values.get("blocks", 0),
            "write_queue_bytes": values.get("write_queue_bytes", 0),
            "hits_total": values.get("hits_total", 0),
        }
        for tier, values in found.items()
        if "capacity_bytes" in values
    }


def _moved(labels: tuple[str, ...]) -> tuple[str, str]:
    _, operation, nic, _ = labels
    way = "sent" if operation == "write" else "fetched"
    return "bytes", "local" if nic == LOOPBACK else way


_COUNTED: dict[str, Callable[[tuple[str, ...]], tuple[str, str]]] = {
    "agent_storage_read_bytes_total": lambda labels: ("bytes", f"{labels[0]}_read"),
    "agent_storage_write_bytes_total": lambda labels: ("bytes", f"{labels[0]}_written"),
    "agent_moved_bytes_total": _moved,
    "engine_moved_bytes_total": _moved,
    "agent_hits_total": lambda labels: ("hits", labels[0]),
    "agent_delivered_bytes_total": lambda labels: ("delivered_bytes", labels[0]),
}


def counts(samples: Iterable[Sample]) -> Counts:
    """Counters of one process. Each byte is counted where the process runs that moves it."""
    found: Counts = Counter()
    for sample in samples:
        # In a large cluster there are many samples, and few of them are for here.
        name = _COUNTED.get(sample.metric)
        if name is not None and (value := _number(sample)) is not None:
            found[name(sample.labels)] += value
    return found


def grown(now: Counts, before: Counts) -> Counts:
    """What has been counted since; a counter that is smaller than before began anew."""
    return Counter(
        {
            name: value - before[name] if value >= before[name] else value
            for name, value in now.items()
            if value != before[name]
        }
    )


def _number(sample: Sample) -> int | None:
    """None for one that a process of another build has sent."""
    if sample.declared() is None or isinstance(sample.value, Latencies):
        return None
    return int(sample.value)
