"""What all requests of a gateway share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Protocol, TypedDict

from fastapi import Request

from common.tracing.spans import make_tracer
from launch.gateway.admission import Admission, Seat
from launch.gateway.body import read_body
from launch.gateway.config import GatewayConfig
from launch.gateway.dashboard.counted import TierView, tiers
from launch.gateway.dashboard.history import History
from launch.gateway.doors.salts import salt_keys, tell_digests
from launch.gateway.errors import GatewayError
from launch.gateway.metrics import GatewayMetrics
from launch.gateway.orders import Orders
from launch.gateway.outage import Outage
from launch.gateway.peers.control_plane import ControlPlane
from launch.gateway.peers.engine_client import EngineClient
from launch.gateway.peers.http_probe import HttpProbe
from launch.gateway.peers.roster import Roster
from launch.gateway.recent_requests import EndedView, RecentRequests
from launch.gateway.registry.registry import Registry
from launch.gateway.request.parts import Part
from launch.gateway.request.suspects import Suspects
from launch.gateway.weights.update import WeightsView, WeightUpdate
from scheduler.cluster_view import ClusterView
from scheduler.scheduler import Scheduler

SWEEP_S = 0.5


class Walk(Protocol):
    """A part of a request that is under way."""

    part: Part
    seat: Seat

    def cancel(self) -> None:
        """The client is gone."""

    def fail(self, error: GatewayError) -> None:
        """The gateway ends it."""

    async def abort(self) -> None:
        """The client wants the answer to end."""

    async def pause(self) -> None:
        """Weights are to be updated: it ends with what it has, or begins again afterwards."""

    @property
    def is_at_engines(self) -> bool:
        """They have it."""

    @property
    def is_prefilled(self) -> bool:
        """It decodes."""


class RequestsView(TypedDict):
    """What the gateway has to do."""

    admitted: int
    admitted_max: int
    queued: int
    tenants_queued: int
    displaced_total: int
    recent: list[EndedView]


class GatewayView(ClusterView):
    """The scheduler's view of the cluster, with the gateway's own requests."""

    standing: str
    """Of this gateway: :class:`~launch.gateway.standby.leadership.Standing`."""
    requests: RequestsView
    tiers: dict[str, dict[str, TierView]]
    """By agent and tier."""
    weights: WeightsView


class Services:
    """Connections, scheduler, admission, metrics, and the walks under way."""

    def __init__(
        self, config: GatewayConfig, scheduler: Scheduler, plane: ControlPlane, orders: Orders
    ) -> None:
        self.config = config
        self.scheduler = scheduler
        self.orders = orders
        self.plane = plane
        self.leadership = plane.leadership
        connections_max = 4 * config.requests_max + 64
        self.client = EngineClient(plane.members, connections_max, config.keys.engine_key)
        self.probe = HttpProbe(self.client, plane.http_state)
        self.registry = Registry(plane.members, Roster(plane, self.probe), orders, scheduler)
        self.admission = Admission(config.requests_max)
        self.weights = WeightUpdate(self)
        self.outage = Outage(config.engine_wait_s, plane.wait_change)
        self.suspects = Suspects(plane.pairs)
        plane.on_engine_lost = self.suspects.engine_lost
        self.metrics = GatewayMetrics(plane, self.registry, self.admission, self.outage)
        self.history = History(plane.members, self.metrics)
        self.walks: dict[tuple[str, str], Walk] = {}
        """By tenant and the client's id."""
        self.salt_keys = {} if config.doors.share_cache else salt_keys(config.keys.api_keys)
        """By tenant; empty where no salts are derived."""
        self.recent = RecentRequests()
        self.tracer = make_tracer(config.otlp_traces_endpoint, "dualpath-gateway", "gateway")
        self._background: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        tell_digests(self.salt_keys)
        self.plane.start()
        self.probe.start()
        self.history.start()
        self._sweeping = asyncio.create_task(self._sweep())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            if self.leadership.is_active:
                self.registry.sweep()

    def in_background(self, work: Coroutine[None, None, None]) -> None:
        """Run clean-up that must survive the request; ``work`` bounds its own time."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        for walk in list(self.walks.values()):
            walk.cancel()
        while self._background:
            await asyncio.wait(set(self._background))
        await self.weights.catch_up.close()
        self._sweeping.cancel()
        await asyncio.gather(self._sweeping, return_exceptions=True)
        await self.history.close()
        await self.probe.close()
        await self.client.close()
        await self.plane.close()
        self.tracer.close()

    def view(self) -> GatewayView:
        """What operators see."""
        requests: RequestsView = {
            "admitted": self.admission.admitted,
            "admitted_max": self.config.requests_max,
            "queued": self.admission.queued,
            "tenants_queued": self.admission.tenants_queued,
            "displaced_total": self.admission.displaced_total,
            "recent": self.recent.view(),
        }
        return {
            **self.scheduler.cluster(time.monotonic()),
            "standing": self.leadership.standing.value,
            "requests": requests,
            "weights": self.weights.view(),
            "tiers": {n: tiers(agent.samples()) for n, agent in self.plane.members.agents.items()},
        }


def services_of(request: Request) -> Services:
    """Of the gateway that the request has come to."""
    services: Services = request.app.state.services
    return services


async def body_of(request: Request) -> bytes:
    """All of it; raises what :func:`launch.gateway.body.read_body` does."""
    return await read_body(request, services_of(request).config.limits.body_bytes_max)
