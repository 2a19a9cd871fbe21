"""The gateway's control connections: who is alive, who holds what, and one plan's hand-over.

One zmq DEALER for each agent and engine. What they report goes to the scheduler at
once; a process is used only while it gives signs of life.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable

import zmq.asyncio

from common.block import Namespace
from common.ids import Incarnation, PlanId
from common.messages import (
    AgentHello,
    AgentStatus,
    Announcement,
    Delivered,
    EndPlan,
    EngineHello,
    EnginePlan,
    Ping,
    PlanAccepted,
    PlanRefused,
    ReadShare,
    ReleasePlan,
    ShareRead,
)
from launch.gateway.config import GatewayConfig
from launch.gateway.control.peers import AgentPeer, EnginePeer, Peer, PeerUnreachable
from launch.gateway.errors import AttemptFailed
from scheduler.plan import Plan
from scheduler.scheduler import Scheduler

log = logging.getLogger(__name__)

PING_S = 1.0
CHECK_S = 0.25
"""How often silent peers are looked for."""
ACCEPT_TIMEOUT_S = 2.0
HOLD_S = 120.0
"""Readers keep a plan's blocks, and engines the plan, no longer than this."""


class ControlPlane:
    """All peers, and the scheduler that their reports feed. Lives in one asyncio loop."""

    def __init__(self, config: GatewayConfig, scheduler: Scheduler) -> None:
        self.config = config
        self.scheduler = scheduler
        self.changed = asyncio.Event()
        """Set at all that may let a queued request go on."""
        self._context = zmq.asyncio.Context()
        self.agents = {n: AgentPeer(n, e, self._context) for n, e in config.agents.items()}
        self.engines = {a.name: EnginePeer(a, self._context) for a in config.engines}
        self._shares: dict[tuple[int, str], asyncio.Future[ShareRead | None]] = {}
        self._accepts: dict[tuple[int, str], asyncio.Future[bool]] = {}
        self.on_delivered: dict[int, Callable[[Delivered], None]] = {}
        """By plan: who wants to hear of its deliveries."""
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        for agent in self.agents.values():
            self._tasks.append(asyncio.create_task(self._serve_agent(agent)))
        for engine in self.engines.values():
            self._tasks.append(asyncio.create_task(self._serve_engine(engine)))
        self._tasks.append(asyncio.create_task(self._keep_watch()))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for peer in self.peers():
            peer.close()
        self._context.destroy(0)

    def peers(self) -> list[AgentPeer | EnginePeer]:
        return [*self.agents.values(), *self.engines.values()]

    async def wait_change(self) -> None:
        """Return at the next report, or after ``CHECK_S``. For one waiter at a time."""
        self.changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.changed.wait(), CHECK_S)

    # ---- liveness ---------------------------------------------------------------------

    def alive(self, peer: Peer) -> bool:
        if time.monotonic() - peer.last_seen_s > self.config.scheduler.heartbeat_timeout_s:
            return False
        return peer.http_alive if isinstance(peer, EnginePeer) else True

    def live_engines(self, role: str | None = None) -> list[EnginePeer]:
        return [
            e
            for e in self.engines.values()
            if self.alive(e) and (role is None or e.address.role == role)
        ]

    def namespace(self) -> Namespace | None:
        """The namespace that is served: the one of most live engines with both roles in it."""
        roles: dict[Namespace, set[str]] = {}
        sizes: Counter[Namespace] = Counter()
        for engine in self.live_engines():
            namespace = engine.known().namespace
            roles.setdefault(namespace, set()).add(engine.address.role)
            sizes[namespace] += 1
        for namespace, _ in sizes.most_common():
            if len(roles[namespace]) == 2:
                return namespace
        return None

    def troubles(self) -> list[str]:
        """Why no request can be served; empty when one can."""
        missing = [r for r in ("prefill", "decode") if not self.live_engines(r)]
        if missing:
            return [f"no live {role} engine" for role in missing]
        if self.namespace() is None:
            return ["no prefill and decode engine serve the same model, weights and KV layout"]
        return []

    def strangers(self) -> frozenset[str]:
        """Live engines of another namespace than the served one: they cannot exchange KV."""
        served = self.namespace()
        return frozenset(e.name for e in self.live_engines() if e.known().namespace != served)

    def http_state(self, engine: EnginePeer, alive: bool) -> None:
        """Outcome of polling the engine's HTTP port."""
        if engine.http_alive and not alive:
            self.scheduler.engine_lost(engine.name)
            engine.notify("does not answer HTTP")
        rejoined = alive and not engine.http_alive
        engine.http_alive = alive
        if rejoined and engine.hello is not None:
            self._engine_hello(engine, engine.hello)

    async def _keep_watch(self) -> None:
        pinged_s = -math.inf
        living: set[str] = set()
        peers = self.peers()
        while True:
            now = time.monotonic()
            due = now - pinged_s >= PING_S
            pinged_s = now if due else pinged_s
            for peer in peers:
                if due or not self.alive(peer):  # one that comes back is wanted at once
                    peer.try_send(Ping())
            for agent in self.agents.values():
                if not agent.synced and agent.incarnation >= 0:
                    agent.resync(now)
            for peer in peers:
                if self.alive(peer):
                    living.add(peer.name)
                elif peer.name in living:
                    living.discard(peer.name)
                    log.warning("peer lost peer=%s", peer.name)
                    peer.notify("fell silent")
            await asyncio.sleep(CHECK_S)

    # ---- what comes in ----------------------------------------------------------------

    async def _serve_agent(self, agent: AgentPeer) -> None:
        agent.watchers.add(lambda _: self._give_up_shares(agent.name))
        while True:
            message = await agent.receive()
            now = agent.last_seen_s = time.monotonic()
            match message:
                case AgentHello(incarnation=incarnation):
                    self._agent_renewed(agent, incarnation, now)
                case AgentStatus() if message.load.agent == agent.name:
                    self._agent_renewed(agent, message.load.incarnation, now)
                    self._agent_status(agent, message, now)
                case Announcement():
                    self._agent_renewed(agent, message.incarnation, now)
                    self._announced(agent, message, now)
                case ShareRead():
                    future = self._shares.get((message.plan, agent.name))
                    if future is not None and not future.done():
                        future.set_result(message)
                case Delivered():
                    if message.plan in self.on_delivered:
                        self.on_delivered[message.plan](message)
                case _:
                    agent.malformed_total += 1

    def _agent_renewed(self, agent: AgentPeer, incarnation: Incarnation, now: float) -> None:
        if agent.renew(incarnation):
            log.info("agent joined agent=%s incarnation=%d", agent.name, incarnation)
            agent.snapshot_asked_s = -math.inf
            agent.resync(now)

    def _agent_status(self, agent: AgentPeer, status: AgentStatus, now: float) -> None:
        agent.status = status
        self.scheduler.report(status.load, now)
        self.changed.set()

    def _announced(self, agent: AgentPeer, news: Announcement, now: float) -> None:
        known = self.scheduler.announce(
            agent.name, news.incarnation, news.sequence, news.snapshot, news.changes
        )
        if known:
            agent.synced = True
        elif news.incarnation == agent.incarnation:
            agent.resync(now)

    async def _serve_engine(self, engine: EnginePeer) -> None:
        while True:
            message = await engine.receive()
            engine.last_seen_s = time.monotonic()
            match message:
                case EngineHello() if message.load.engine == engine.name:
                    self._engine_hello(engine, message)
                case PlanAccepted() | PlanRefused():
                    future = self._accepts.get((message.plan, engine.name))
                    if future is not None and not future.done():
                        future.set_result(isinstance(message, PlanAccepted))
                case _:
                    engine.malformed_total += 1

    def _engine_hello(self, engine: EnginePeer, hello: EngineHello) -> None:
        incarnation = hello.load.incarnation
        if incarnation < engine.incarnation:
            return
        if engine.renew(incarnation):
            log.info("engine joined engine=%s incarnation=%d", engine.name, incarnation)
        engine.hello = hello
        if not engine.http_alive:
            return
        self.scheduler.report(hello.load, engine.last_seen_s)
        self.changed.set()

    # ---- one plan ---------------------------------------------------------------------

    async def read_shares(self, plan: Plan) -> dict[str, ShareRead | None]:
        """Have the plan's readers bring its blocks to DRAM; None of one that died or is late."""
        futures = {}
        for agent, keys in plan.shares().items():
            future = asyncio.get_running_loop().create_future()
            futures[agent] = self._shares[plan.id, agent] = future
            try:
                self.agents[agent].send(ReadShare(plan.id, keys, HOLD_S, plan.experiment))
            except PeerUnreachable as error:
                log.warning("share not sent plan=%d peer=%s", plan.id, error)
                future.set_result(None)
        try:
            if futures:
                await asyncio.wait(futures.values(), timeout=self.config.read_timeout_s)
        finally:
            for agent in futures:
                del self._shares[plan.id, agent]
        return {agent: f.result() if f.done() else None for agent, f in futures.items()}

    def _give_up_shares(self, agent: str) -> None:
        for (_, reader), future in self._shares.items():
            if reader == agent and not future.done():
                future.set_result(None)

    async def place(self, plan: Plan, namespace_digest: bytes) -> None:
        """Hand the plan to both engines. Raises :class:`AttemptFailed` if one refuses it, or
        does not accept it in time."""
        brought = plan.keys, plan.agents, plan.reader
        message = EnginePlan(plan.id, plan.rid, namespace_digest, *brought, HOLD_S)
        futures = {}
        for name in (plan.prefill, plan.decode):
            future = asyncio.get_running_loop().create_future()
            futures[name] = self._accepts[plan.id, name] = future
            self.engines[name].try_send(message)
        try:
            await asyncio.wait(futures.values(), timeout=ACCEPT_TIMEOUT_S)
        finally:
            for name in futures:
                del self._accepts[plan.id, name]
        silent = [name for name, future in futures.items() if not future.done()]
        if silent:
            raise AttemptFailed(f"{' and '.join(silent)} took no plan", frozenset(silent))
        refused = [name for name, future in futures.items() if not future.result()]
        if refused:
            raise AttemptFailed(f"{' and '.join(refused)} had other weights than planned for")

    def release(self, plan: PlanId, agents: Iterable[str]) -> None:
        """The readers need not keep the plan's blocks any longer."""
        for agent in agents:
            self.agents[agent].try_send(ReleasePlan(plan))

    def end(self, plan: Plan) -> None:
        """The request is over, whatever became of it."""
        for name in (plan.prefill, plan.decode):
            self.engines[name].try_send(EndPlan(plan.id, plan.rid))
        self.release(plan.id, plan.agents)
        self.scheduler.finished(plan.id, time.monotonic())
        self.changed.set()
