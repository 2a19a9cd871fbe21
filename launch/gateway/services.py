"""What all requests of a gateway share, and what they leave behind for operators to see."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine
from typing import Any, Protocol

from launch.gateway.admission import Admission
from launch.gateway.config import GatewayConfig
from launch.gateway.control.control_plane import ControlPlane
from launch.gateway.control.engine_proxy import EngineProxy
from launch.gateway.metrics import GatewayMetrics
from launch.gateway.orders import Orders
from launch.gateway.request.parts import Part
from launch.gateway.request.prompt import vocabulary_tokens
from launch.gateway.request.trace import Trace
from scheduler.scheduler import Scheduler

RECENT_KEPT = 32
"""Ended requests that ``/admin/cluster`` shows."""


class Walk(Protocol):
    """A part of a request that is under way."""

    def cancel(self) -> None:
        """The client is gone."""

    async def abort(self) -> None:
        """The client wants the answer to end."""


class Services:
    """Connections, scheduler, admission, metrics, and the walks under way."""

    def __init__(
        self, config: GatewayConfig, scheduler: Scheduler, plane: ControlPlane, orders: Orders
    ) -> None:
        self.config = config
        self.scheduler = scheduler
        self.orders = orders
        self.plane = plane
        self.proxy = EngineProxy(plane, connections_max=4 * config.requests_max + 64)
        self.admission = Admission(config.requests_max)
        self.metrics = GatewayMetrics(plane, self.admission)
        self.vocabulary_tokens = vocabulary_tokens(config.model)
        self.walks: dict[str, Walk] = {}
        self._recent: deque[tuple[float, dict[str, Any]]] = deque(maxlen=RECENT_KEPT)
        self._background: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self.plane.start()
        self.proxy.start()

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run clean-up that must survive the request; ``work`` bounds its own time."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        for walk in list(self.walks.values()):
            walk.cancel()
        while self._background:
            await asyncio.wait(set(self._background))
        await self.proxy.close()
        await self.plane.close()

    # ---- what can be seen -------------------------------------------------------------

    def note(self, part: Part, trace: Trace, hit_tokens: int, outcome: str) -> None:
        """A part of a request has ended."""
        ended = {
            "rid": part.rid,
            "outcome": outcome,
            "plan": trace.plan,
            "prefill": trace.prefill,
            "decode": trace.decode,
            "readers": {agent: reader.blocks for agent, reader in trace.readers.items()},
            "prompt_tokens": len(part.token_ids or ()),
            "hit_tokens": hit_tokens,
            "attempts": trace.attempts,
            "timings_s": trace.timings_s,
        }
        self._recent.append((time.monotonic(), ended))

    def view(self) -> dict[str, Any]:
        """The scheduler's view of the cluster, with the gateway's own requests."""
        now = time.monotonic()
        admission = self.admission
        return self.scheduler.cluster(now) | {
            "requests": {
                "admitted": admission.admitted,
                "admitted_max": self.config.requests_max,
                "queued": admission.queued,
                "tenants_queued": admission.tenants_queued,
                "displaced_total": admission.displaced_total,
                "recent": [{"age_s": now - at, **ended} for at, ended in reversed(self._recent)],
            }
        }
