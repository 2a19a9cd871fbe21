"""The gateway's control connections: what agents and engines report goes to the scheduler.

One zmq DEALER for each agent and engine. A process is used only while it gives signs of life.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence

from common.ids import Incarnation
from common.messages.fields import Ping, Superseded
from common.messages.from_agents import AgentHello, AgentStatus, Announcement, Delivered, ShareRead
from common.messages.from_engines import EngineEnds, EngineHello, PlanAccepted, PlanRefused
from launch.gateway.config import GatewayConfig
from launch.gateway.peers.known_members import KnownMembers
from launch.gateway.peers.membership import Membership
from launch.gateway.peers.peer import AgentPeer, EnginePeer
from launch.gateway.peers.plan_handover import PlanHandover
from launch.gateway.standby.leadership import Leadership
from scheduler.plan import Plan
from scheduler.scheduler import Scheduler

log = logging.getLogger(__name__)

PING_S = 1.0
CHECK_S = 0.25
"""How often silent peers are looked for."""


class ControlPlane:
    """All peers, and the scheduler that their reports feed. Lives in one asyncio loop."""

    def __init__(self, config: GatewayConfig, scheduler: Scheduler, leadership: Leadership) -> None:
        self.scheduler = scheduler
        self.leadership = leadership
        self.members = Membership(config)
        self.plans = PlanHandover(self.members, config.read_timeout_s, scheduler.engine_lost)
        self.on_engine_lost: Callable[[str, Incarnation, Sequence[str]], None] = _nobody
        """Told of an engine's loss, and of the requests that its last words were about, before
        those who watch it are."""
        self.on_engine_heard: Callable[[], None] = _not_asked
        """Told of each report of an engine."""
        self.changed = asyncio.Event()
        """Set at all that may let a queued request go on."""
        self.known = KnownMembers(self.members, leadership)
        self.serving: dict[str, asyncio.Task[None]] = {}
        """By peer: what hears it."""
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        for peer in self.members.peers():
            self.serve(peer)
        self._watch = asyncio.create_task(self._keep_watch())

    def serve(self, peer: AgentPeer | EnginePeer) -> None:
        """Hear a peer from now on."""
        hears = self._serve_engine if isinstance(peer, EnginePeer) else self._serve_agent
        self.serving[peer.name] = asyncio.create_task(hears(peer))  # type: ignore[arg-type]

    async def close(self) -> None:
        tasks = [*self.serving.values(), *([self._watch] if self._watch is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.members.close()

    def expected(self) -> bool:
        """Whether every role has an engine that serves once it lives, or is back: not one that is
        drained; or may have one: nodes have had no time yet to tell this gateway that they are
        there."""
        engines, drained = self.members.engines, self.scheduler.drained - self.members.missed
        if len({engine.address.role for engine in engines.values()}) < 2:
            return not self.known.is_complete
        roles = {e.address.role for n, e in engines.items() if n not in drained}
        return len(roles) == 2

    def pairs(self) -> int:
        """Of a prefill and a decode process that requests can go to, at most."""
        useless = self.members.strangers() | self.scheduler.drained
        usable = [e.address for e in self.members.live_engines() if e.name not in useless]
        return min(len({a.http for a in usable if a.role == r}) for r in ("prefill", "decode"))

    async def wait_change(self) -> None:
        """Return at the next report, or after ``CHECK_S``."""
        self.changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.changed.wait(), CHECK_S)

    def end(self, plan: Plan) -> None:
        """The request is over, whatever became of it: for all who know of its plan."""
        self.plans.end(plan)
        self.scheduler.finished(plan.id, time.monotonic())
        self.changed.set()

    # ---- signs of life ----------------------------------------------------------------

    def http_state(self, engine: EnginePeer, alive: bool) -> None:
        """Outcome of probing the engine's HTTP port."""
        lost = engine.http_alive and not alive
        rejoined = alive and not engine.http_alive
        engine.http_alive = alive
        if lost:
            self._engine_lost(engine, "does not answer HTTP")
        if rejoined and engine.hello is not None:
            self._engine_hello(engine, engine.hello)

    async def _keep_watch(self) -> None:
        pinged_s = -math.inf
        living: set[str] = set()
        while True:
            peers = self.members.peers()
            living.intersection_update(peer.name for peer in peers)
            now = time.monotonic()
            due = now - pinged_s >= PING_S
            pinged_s = now if due else pinged_s
            for peer in peers:
                if due or not self.members.alive(peer):  # one that comes back is wanted at once
                    peer.try_send(Ping(self.leadership.term if self.leadership.is_active else 0))
            for agent in self.members.agents.values():
                if not agent.synced and agent.incarnation >= 0:
                    agent.resync(now)
            for peer in peers:
                if self.members.alive(peer):
                    living.add(peer.name)
                elif peer.name in living:
                    living.discard(peer.name)
                    log.warning("peer lost peer=%s", peer.name)
                    if isinstance(peer, EnginePeer):
                        self._engine_lost(peer, "fell silent")
                    else:
                        peer.notify("fell silent")
            await asyncio.sleep(CHECK_S)

    # ---- what comes in ----------------------------------------------------------------

    async def _serve_agent(self, agent: AgentPeer) -> None:
        while True:
            message = await agent.receive()
            now = agent.last_seen_s = time.monotonic()
            match message:
                case AgentHello(incarnation=incarnation):
                    self._agent_renewed(agent, incarnation, now)
                case AgentStatus() if message.load.agent == agent.name:
                    self._agent_renewed(agent, message.load.incarnation, now)
                    agent.status = message
                    self.known.heard(agent, message.heard)
                    self.scheduler.report(message.load, now)
                    self.changed.set()
                case Announcement():
                    self._agent_renewed(agent, message.incarnation, now)
                    self._announced(agent, message, now)
                case ShareRead():
                    self.plans.share_read(agent.name, message)
                case Delivered():
                    self.plans.delivered(message)
                case Superseded():
                    self.known.refused(agent, message.term)
                case _:
                    agent.malformed_total += 1

    def _agent_renewed(self, agent: AgentPeer, incarnation: Incarnation, now: float) -> None:
        if agent.renew(incarnation):
            log.info("agent joined agent=%s incarnation=%d", agent.name, incarnation)
            agent.snapshot_asked_s = -math.inf
            agent.resync(now)

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
                case EngineEnds(incarnation=incarnation) if incarnation == engine.incarnation:
                    log.error("engine ends engine=%s reason=%s", engine.name, message.reason)
                    engine.ended = incarnation
                    self._engine_lost(engine, f"ended: {message.reason}", message.rids)
                case Superseded():
                    self.known.refused(engine, message.term)
                case PlanAccepted() | PlanRefused():
                    self.plans.answered(engine.name, message)
                case _:
                    engine.malformed_total += 1

    def _engine_hello(self, engine: EnginePeer, hello: EngineHello) -> None:
        incarnation = hello.load.incarnation
        if incarnation < engine.incarnation or incarnation == engine.ended:
            return
        if 0 <= engine.incarnation < incarnation:
            self._engine_lost(engine, "restarted")
        if engine.renew(incarnation):
            log.info("engine joined engine=%s incarnation=%d", engine.name, incarnation)
        engine.hello = hello
        self.known.heard(engine, hello.heard)
        if not engine.http_alive:
            return
        engine.lost = False
        self.scheduler.report(hello.load, engine.last_seen_s)
        self.on_engine_heard()
        self.changed.set()

    def _engine_lost(self, engine: EnginePeer, reason: str, rids: Sequence[str] = ()) -> None:
        """It is of no use until it reports again; ``rids``: what it was at work on."""
        if engine.lost:
            if rids:  # its last words came after the end of its connections was seen
                self.on_engine_lost(engine.name, engine.incarnation, rids)
            return
        engine.lost = True
        self.scheduler.engine_lost(engine.name)
        self.on_engine_lost(engine.name, engine.incarnation, rids)
        engine.notify(reason)


def _not_asked() -> None:
    """Nobody wants to know."""


def _nobody(engine: str, incarnation: Incarnation, rids: Sequence[str]) -> None:
    """Wants to know."""
