"""Engines in the words of SGLang's router: workers, by their names. Engines answer nobody but the
gateway, so a worker's URL is the gateway's own: who aborts requests there aborts all of them."""

from __future__ import annotations

from typing import TypedDict
from urllib.parse import urlsplit

import msgspec

from common.cluster.membership import AgentAddress, EngineAddress, NodeMembers, Role
from launch.gateway.errors import BadRequest, NotFound
from launch.gateway.orders import Orders
from launch.gateway.peers.control_plane import ControlPlane
from launch.gateway.peers.peer import EnginePeer
from launch.gateway.registry.registry import Registry

ITSELF = "gateway"
LABELS = ("name", "control", "agent", "agent-control")
"""That an engine needs to be taken by hand: its name and zmq endpoint, and those of its agent."""


class WorkerRequest(msgspec.Struct, frozen=True):
    """Body of ``POST /workers``; what else SGLang's router takes is of no effect here."""

    url: str
    worker_type: str = ""
    labels: dict[str, str] = {}


class WorkerView(TypedDict):
    """As SGLang's router shows one."""

    id: str
    url: str
    """Where callers reach it; where it listens itself is ``metadata["http"]``."""
    model_id: str
    worker_type: str
    is_healthy: bool
    load: int
    connection_mode: str
    bootstrap_port: int | None
    metadata: dict[str, str]


class WorkersView(TypedDict):
    """All of them."""

    workers: list[WorkerView]
    total: int
    stats: dict[str, int]


class Workers:
    """Shows engines, takes them and lets them go."""

    def __init__(
        self, plane: ControlPlane, registry: Registry, orders: Orders, own_url: str
    ) -> None:
        """``own_url``: the gateway's, as a caller knows it."""
        self._own_url = own_url.rstrip("/")
        self._plane = plane
        self._registry = registry
        self._orders = orders

    def listed(self) -> WorkersView:
        views = [self._view(engine) for engine in self._plane.members.engines.values()]
        stats = {
            f"{role}_count": sum(view["worker_type"] == role for view in views)
            for role in ("prefill", "decode", "regular")
        }
        return {"workers": views, "total": len(views), "stats": stats}

    def one(self, name: str) -> WorkerView:
        """Raises :class:`NotFound`."""
        return self._view(self._engine(name))

    def urls(self) -> list[str]:
        return [engine.address.http for engine in self._plane.members.engines.values()]

    def name_at(self, url: str) -> str:
        """Of the engine there; raises :class:`NotFound`."""
        for name, engine in self._plane.members.engines.items():
            if engine.address.http.rstrip("/") == url.rstrip("/"):
                return name
        raise NotFound(f"no engine is at {url}")

    def add(self, asked: WorkerRequest) -> str:
        """One that is known gets requests again; another one needs ``LABELS``. Returns its name.
        A trainer that takes the gateway for its router and for its engine adds it to itself."""
        if asked.url.rstrip("/") == self._own_url:
            return ITSELF
        try:
            name = self.name_at(asked.url)
        except NotFound:
            return self._take(asked)
        self._orders.drain(name, False)
        return name

    def remove(self, name: str) -> str:
        """Nothing new for it; it is forgotten when nothing is under way there and, if its node has
        a lease, when that leaves. Raises :class:`NotFound`."""
        self._engine(name)
        if not self._registry.let_go(name):
            self._orders.drain(name, True)
        self._plane.changed.set()
        return name

    # ---- inside -----------------------------------------------------------------------

    def _engine(self, name: str) -> EnginePeer:
        engines = self._plane.members.engines
        if name not in engines:
            raise NotFound(f"no engine {name!r}: there are {', '.join(engines)}")
        return engines[name]

    def _take(self, asked: WorkerRequest) -> str:
        host = urlsplit(asked.url).hostname
        missing = [label for label in LABELS if not asked.labels.get(label)]
        if not host or missing or asked.worker_type not in ("prefill", "decode"):
            raise BadRequest(
                "An engine that is not known yet joins by `python -m launch.node`; by hand it "
                'needs url, worker_type ("prefill" or "decode") and the labels '
                f"{', '.join(LABELS)}."
            )
        name, control, agent, agent_control = (asked.labels[label] for label in LABELS)
        engine = EngineAddress(name, asked.worker_type, agent, asked.url.rstrip("/"), control, host)
        members = NodeMembers(AgentAddress(agent, agent_control), [engine])
        self._registry.take(name, Role(asked.worker_type), members)
        return name

    def _view(self, engine: EnginePeer) -> WorkerView:
        hello, members = engine.hello, self._plane.members
        draining = engine.name in self._plane.scheduler.drained
        return {
            "id": engine.name,
            "url": self._own_url,
            "model_id": hello.namespace.model_digest if hello is not None else "",
            "worker_type": engine.address.role,
            "is_healthy": members.alive(engine) and not draining,
            "load": hello.load.sequences if hello is not None else 0,
            "connection_mode": "http",
            "bootstrap_port": (hello.bootstrap_port or None) if hello is not None else None,
            "metadata": {
                "agent": engine.address.agent,
                "control": engine.address.control,
                "http": engine.address.http,
                "state": self._state(engine.name, draining),
            },
        }

    def _state(self, name: str, draining: bool) -> str:
        nodes = self._registry.nodes.values()
        lacks_a_host = name in self._plane.members.missed
        if lacks_a_host or any(node.is_gone for node in nodes if name in node.names):
            return "gone"  # a lease has run out
        return "draining" if draining else "serving"
