"""One plan at those who carry it out: its shares read, itself accepted by both engines, its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

from common.ids import PlanId
from common.messages.from_agents import Delivered, ShareRead
from common.messages.from_engines import PlanAccepted, PlanRefused
from common.messages.from_gateway import EndPlan, EnginePlan, ReadShare, ReleasePlan
from launch.gateway.errors import AttemptFailed, PlanStale
from launch.gateway.peers.membership import Membership
from launch.gateway.peers.peer import AgentPeer, PeerUnreachable
from scheduler.plan import Plan

log = logging.getLogger(__name__)

T = TypeVar("T")

ACCEPT_TIMEOUT_S = 2.0
HOLD_S = 120.0
"""Readers keep a plan's blocks, and engines the plan, no longer than this."""


class PlanHandover:
    """Orders to readers and engines, and their answers, by plan."""

    def __init__(
        self, members: Membership, read_timeout_s: float, on_silent: Callable[[str], None]
    ) -> None:
        """``on_silent``: of an engine that takes no plan; it is of no use until it is heard."""
        self._members = members
        self._on_silent = on_silent
        self._read_timeout_s = read_timeout_s
        self._shares: dict[tuple[PlanId, str], asyncio.Future[ShareRead | None]] = {}
        self._accepts: dict[tuple[PlanId, str], asyncio.Future[PlanAccepted | PlanRefused]] = {}
        """Why a plan was refused; "" when it was not."""
        self.on_delivered: dict[PlanId, Callable[[Delivered], None]] = {}
        """By plan: who wants to hear of its deliveries."""
        for agent in members.agents.values():
            self.watch(agent)

    def watch(self, agent: AgentPeer) -> None:
        """When it dies or leaves, nobody waits for its shares."""
        agent.watchers.add(partial(self._give_up_shares, agent.name))

    async def read_shares(self, plan: Plan, traceparent: str = "") -> dict[str, ShareRead | None]:
        """Have the plan's readers bring its blocks to DRAM; None of one that died or is late."""
        futures = {}
        for agent, keys in plan.shares().items():
            future = asyncio.get_running_loop().create_future()
            futures[agent] = self._shares[plan.id, agent] = future
            sizes = plan.share_sizes(agent)
            order = ReadShare(plan.id, keys, HOLD_S, plan.experiment, traceparent, sizes)
            try:
                if agent not in self._members.agents:
                    raise PeerUnreachable(f"{agent} has left the cluster")
                self._members.agents[agent].send(order)
            except PeerUnreachable as error:
                log.warning("share not sent plan=%d peer=%s", plan.id, error)
                future.set_result(None)
        try:
            if futures:
                await asyncio.wait(futures.values(), timeout=self._read_timeout_s)
        finally:
            for agent in futures:
                del self._shares[plan.id, agent]
        return {agent: f.result() if f.done() else None for agent, f in futures.items()}

    async def place(self, plan: Plan, namespace_digest: bytes, no_store: bool = False) -> None:
        """Hand the plan to both engines. Raises :class:`PlanStale` if all that refuse it have other
        weights by now, else :class:`AttemptFailed`, as when one does not accept it in time."""
        message = EnginePlan(
            id=plan.id,
            rid=plan.engine_rid,
            namespace_digest=namespace_digest,
            keys=plan.keys,
            agents=plan.agents,
            reader=plan.reader,
            deadline_s=HOLD_S,
            experiment=plan.experiment,
            part_readers=plan.part_readers,
            no_store=no_store,
        )
        futures = {}
        for name in (plan.prefill, plan.decode):
            future = asyncio.get_running_loop().create_future()
            futures[name] = self._accepts[plan.id, name] = future
            if name in self._members.engines:  # else it does not accept the plan
                self._members.engines[name].try_send(message)
        try:
            await asyncio.wait(futures.values(), timeout=ACCEPT_TIMEOUT_S)
        finally:
            for name in futures:
                del self._accepts[plan.id, name]
        silent = [name for name, future in futures.items() if not future.done()]
        if silent:
            for name in silent:
                self._on_silent(name)
            raise AttemptFailed(f"{' and '.join(silent)} took no plan")
        answers = [(name, future.result()) for name, future in futures.items()]
        refusals = [(name, a) for name, a in answers if isinstance(a, PlanRefused)]
        if refusals:
            failure = PlanStale if all(a.stale for _, a in refusals) else AttemptFailed
            who = " and ".join(f"{name} ({answer.reason})" for name, answer in refusals)
            raise failure(f"{who} refused the plan")

    def release(self, plan: PlanId, agents: Iterable[str]) -> None:
        """The readers need not keep the plan's blocks any longer."""
        for agent in agents:
            if agent in self._members.agents:
                self._members.agents[agent].try_send(ReleasePlan(plan))

    def end(self, plan: Plan) -> None:
        """The request is over, whatever became of it."""
        for name in (plan.prefill, plan.decode):
            if name in self._members.engines:
                self._members.engines[name].try_send(EndPlan(plan.id, plan.engine_rid))
        self.release(plan.id, plan.agents)

    # ---- what is answered -------------------------------------------------------------

    def share_read(self, agent: str, answer: ShareRead) -> None:
        _settle(self._shares.get((answer.plan, agent)), answer)

    def answered(self, engine: str, answer: PlanAccepted | PlanRefused) -> None:
        _settle(self._accepts.get((answer.plan, engine)), answer)

    def delivered(self, news: Delivered) -> None:
        if news.plan in self.on_delivered:
            self.on_delivered[news.plan](news)

    def _give_up_shares(self, agent: str, reason: str) -> None:
        for (_, reader), future in self._shares.items():
            if reader == agent:
                _settle(future, None)


def _settle(future: asyncio.Future[T] | None, result: T) -> None:
    """Nobody may wait any more, and an answer may come twice."""
    if future is not None and not future.done():
        future.set_result(result)
