"""What a cluster holds of the machine, and of itself."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from benchmarks.faults.cluster import Cluster
from benchmarks.own_cluster import ClusterFailed

SHARED = Path("/dev/shm")


class Holdings(msgspec.Struct, frozen=True):
    """At one moment, with nothing under way."""

    sockets: dict[str, int]
    """By the name of the process; of an engine, all of its session."""
    memory_bytes: dict[str, int]
    """Likewise: proportional set size."""
    shared_files: list[str]
    pages_taken: int
    """Of all engines' KV pools, their caches flushed."""
    slots_taken: int
    """Of all agents' DRAM: neither free nor evictable."""


async def look(cluster: Cluster, pool_tokens: int, page_tokens: int) -> Holdings:
    """Of a cluster that serves, and is asked nothing."""
    pids = cluster.all_pids()
    state, metrics = await cluster.operator.state(), await cluster.operator.metrics()
    if state is None:
        raise ClusterFailed("the gateway does not answer, though all is quiet")
    slots = _total(metrics, "agent_dram_slots{")
    return Holdings(
        sockets={name: sum(map(_sockets, found)) for name, found in pids.items()},
        memory_bytes={name: sum(map(_memory_bytes, found)) for name, found in pids.items()},
        shared_files=sorted(os.listdir(SHARED)),
        pages_taken=sum(pool_tokens - e["free_tokens"] for e in state["engines"]) // page_tokens,
        slots_taken=int(slots - _total(metrics, "agent_dram_slots_available{")),
    )


def _total(metrics: dict[str, float], part: str) -> float:
    return sum(value for name, value in metrics.items() if part in name)


def _sockets(pid: int) -> int:
    found = 0
    with contextlib.suppress(OSError):  # it ended
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found += os.readlink(entry.path).startswith("socket:")
    return found


def _memory_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):  # it ended
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
