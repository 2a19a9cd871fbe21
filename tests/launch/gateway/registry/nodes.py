"""Nodes made of stubs that join a running gateway, as launch.node does."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any, TypeVar

import msgspec

from common.cluster.membership import (
    JOIN,
    LEAVE,
    RENEW,
    RESTART,
    TOKEN_PURPOSE,
    AgentAddress,
    Joined,
    JoinRequest,
    LeaveRequest,
    NodeMembers,
    Renewal,
    Renewed,
    Restarted,
    RestartRequest,
    Role,
    State,
)
from tests.control import SECRET
from tests.launch.gateway.agent_stub import StubAgent
from tests.launch.gateway.stubs import StubCluster, StubEngine
from transfer.control.keys import derived

T = TypeVar("T")

TOKEN = {"authorization": f"Bearer {derived(SECRET, TOKEN_PURPOSE)}"}


async def ask(cluster: StubCluster, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    sent = {"content-type": "application/json", **TOKEN, **headers}
    data = msgspec.json.encode(body)
    async with cluster.http.post(path, data=data, headers=sent) as answer:
        return answer.status, await answer.json()


async def told(cluster: StubCluster, path: str, body: Any, kind: type[T]) -> T:
    """An answer that is no error."""
    status, answer = await ask(cluster, path, body)
    assert status == 200, answer
    return msgspec.convert(answer, kind)


class StubNode:
    """An agent and, of P and D, an engine."""

    def __init__(self, cluster: StubCluster, role: Role, name: str, **changes: Any) -> None:
        self.cluster = cluster
        self.role = role
        self.agent = StubAgent(f"agent-{name}")
        self.engine: StubEngine | None = None
        if role is not Role.READER:
            self.engine = StubEngine(name, role.value, cluster.rooms)
            self.engine.agent = self.agent.name
        engines = [cluster.address_of(self.engine)] if self.engine is not None else []
        self.members = NodeMembers(AgentAddress(self.agent.name, self.agent.endpoint), engines)
        self.asked = JoinRequest(role, secrets.token_hex(8), name, self.members)
        self.asked = msgspec.structs.replace(self.asked, **changes)
        self.joined: Joined

    async def join(self) -> Joined:
        if self.engine is not None:
            await self.engine.close_http()
            await self.engine.start_http()
        self.joined = await told(self.cluster, JOIN, self.asked, Joined)
        return self.joined

    async def renew(self, state: State = State.SERVING, incarnation: int = 0) -> Renewed:
        renewal = Renewal(self.joined.lease, self.members, state, incarnation)
        return await told(self.cluster, RENEW, renewal, Renewed)

    async def restart(self, ended: int) -> Restarted:
        asked = RestartRequest(self.joined.lease, ended)
        return await told(self.cluster, RESTART, asked, Restarted)

    async def leave(self) -> None:
        await ask(self.cluster, LEAVE, LeaveRequest(self.joined.lease))

    async def lives(self) -> None:
        """Until the gateway may use it."""
        members = self.cluster.services.plane.members
        await self.cluster.until(lambda: self._is_known(members))

    def _is_known(self, members: Any) -> bool:
        agent = members.agents[self.agent.name]
        engine = members.engines.get(self.engine.name) if self.engine is not None else None
        return agent.synced and (self.engine is None or members.alive(engine))

    async def close(self) -> None:
        await asyncio.gather(*(one.close() for one in (self.agent, self.engine) if one is not None))
