"""The last minutes of a cluster, so that a page that is opened now, or again, shows them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from typing import TypedDict

from launch.gateway.dashboard.counted import Counts, counts, grown
from launch.gateway.metrics import GatewayMetrics
from launch.gateway.peers.membership import Membership
from launch.gateway.peers.peer import EnginePeer

INTERVAL_S = 2.0
KEPT = 150
"""Points: five minutes."""


class Point(TypedDict):
    """What ``seconds`` have added; ``at_ms`` is their end, by the clock, and grows."""

    at_ms: int
    seconds: float
    nodes: dict[str, dict[str, dict[str, int]]]
    """By agent, group and name (``counted.Counts``): of the agent and the engines of its node."""
    requests: dict[str, int]
    """By outcome."""
    tokens: dict[str, int]
    """Prompt tokens: hit, recomputed."""


class HistoryView(TypedDict):
    """``GET /admin/history``."""

    interval_s: float
    kept_s: float
    points: list[Point]


class History:
    """The last ``KEPT`` points."""

    def __init__(self, members: Membership, metrics: GatewayMetrics) -> None:
        self._members = members
        self._metrics = metrics
        self._points: deque[Point] = deque(maxlen=KEPT)
        self._before: dict[str, Counts] = {}
        self._own = self._gateways()
        self._noted_s = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def view(self, after_ms: int) -> HistoryView:
        """Points after a time."""
        points = [point for point in self._points if point["at_ms"] > after_ms]
        return {"interval_s": INTERVAL_S, "kept_s": INTERVAL_S * KEPT, "points": points}

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self.note(time.monotonic(), int(time.time() * 1000))

    async def note(self, now_s: float, at_ms: int) -> None:
        """Add a point. Requests go on meanwhile: a thousand processes have much to tell."""
        own = self._gateways()
        if self._points:
            at_ms = max(at_ms, self._points[-1]["at_ms"] + 1)
        point: Point = {
            "at_ms": at_ms,
            "seconds": round(now_s - self._noted_s, 3),
            "nodes": await self._nodes(),
            "requests": _group(own - self._own, "requests"),
            "tokens": _group(own - self._own, "tokens"),
        }
        self._points.append(point)
        self._own, self._noted_s = own, now_s

    async def _nodes(self) -> dict[str, dict[str, dict[str, int]]]:
        """One that is heard for the first time has counted since long ago."""
        nodes: dict[str, Counts] = {}
        heard: dict[str, Counts] = {}
        for peer in self._members.peers():
            if not peer.samples():
                continue
            now = heard[peer.name] = counts(peer.samples())
            node = peer.address.agent if isinstance(peer, EnginePeer) else peer.name
            added = grown(now, self._before[peer.name]) if peer.name in self._before else Counter()
            nodes.setdefault(node, Counter()).update(added)
            await asyncio.sleep(0)
        self._before = heard
        groups = ("bytes", "hits", "delivered_bytes")
        return {n: {g: _group(c, g) for g in groups} for n, c in nodes.items()}

    def _gateways(self) -> Counts:
        own: Counts = Counter()
        for outcome, count in self._metrics.ended().items():
            own["requests", outcome] = count
        for name, count in self._metrics.tokens().items():
            own["tokens", name] = count
        return own


def _group(found: Counts, group: str) -> dict[str, int]:
    return {name: count for (of, name), count in found.items() if of == group}
