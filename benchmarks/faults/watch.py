"""What the gateway says of the cluster, twice a second."""

from __future__ import annotations

import asyncio
import re
import time
from bisect import bisect_left
from typing import Any

import msgspec

from benchmarks.faults.cluster import Cluster

LOOK_EVERY_S = 0.5
UNLIKE = "no prefill and decode engine serve the same"
"""What ``/health`` says while only some engines have new weights."""
ROLES = ("prefill", "decode")
_MISSING = re.compile(r'dualpath:agent_missing_blocks_total\{.*agent="([^"]+)".*\}')


class Look(msgspec.Struct, frozen=True):
    """One look. ``engines``: living ones by role; empty while the gateway did not answer, or no
    two of them had the same weights."""

    time_s: float
    engines: dict[str, int]
    missing: int
    """Blocks gone when they were to be read, of all agents since the start."""


class Watch:
    """``run`` until cancelled; ``looks`` grows."""

    def __init__(self, cluster: Cluster) -> None:
        self.looks: list[Look] = []
        self._cluster = cluster
        self._last: dict[str, float] = {}
        self._missing = 0.0

    async def run(self) -> None:
        while True:
            begun_s = time.monotonic()
            state = await self._cluster.operator.state()
            self._count_missing(await self._cluster.operator.metrics())
            differ = UNLIKE in await self._cluster.operator.troubles()
            engines = {} if state is None or differ else _living(state)
            self.looks.append(Look(begun_s, engines, int(self._missing)))
            await asyncio.sleep(max(0.0, begun_s + LOOK_EVERY_S - time.monotonic()))

    def _count_missing(self, metrics: dict[str, float]) -> None:
        """A counter that is lower than before belongs to a new process."""
        for name, value in metrics.items():
            if _MISSING.fullmatch(name):
                before = self._last.get(name, 0.0)
                self._missing += value - before if value >= before else value
                self._last[name] = value

    def missing_since(self, time_s: float) -> int:
        """Blocks that were missing from then on."""
        before = [look.missing for look in self.looks if look.time_s <= time_s]
        return int(self._missing) - (before[-1] if before else 0)


def _living(state: dict[str, Any]) -> dict[str, int]:
    living = [engine["role"] for engine in state["engines"] if engine["alive"]]
    return {role: living.count(role) for role in ROLES}


def lacked_role(looks: list[Look], since_s: float, until_s: float, patience_s: float) -> bool:
    """Whether some role had no engine for longer than ``patience_s`` without a break, at a time
    between; a gateway that does not answer has none either."""
    times = [look.time_s for look in looks]
    for role in ROLES:
        down_s = None
        for look in looks[max(0, bisect_left(times, since_s - patience_s) - 1) :]:
            if look.time_s > until_s + LOOK_EVERY_S:
                break
            if look.engines.get(role, 0):
                down_s = None
                continue
            down_s = look.time_s if down_s is None else down_s
            if look.time_s - down_s >= patience_s - LOOK_EVERY_S:
                return True
    return False
