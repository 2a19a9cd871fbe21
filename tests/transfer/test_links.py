"""An engine's links to agents that come, move and go while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from common.block import BlockLayout, Namespace
from common.ids import Incarnation
from common.messages.fields import Ping
from common.messages.from_agents import AgentHello
from common.messages.from_engines import RankMemory, RegisterEngine
from common.messages.from_gateway import KnownAgents
from tests.control import keys
from tests.launch.gateway.control_stub import ControlStub
from transfer import client
from transfer.client import AgentLinks

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

NAMESPACE = Namespace("m", "1", "float32", BlockLayout(1, 1, (1,)))
MEMORY = RankMemory("h:1", [[1]], 1)
REGISTRATION = RegisterEngine("p0", Incarnation(1), NAMESPACE, 1, [MEMORY], 1, 1)


class Agent(ControlStub):
    """Gives a credit word to an engine once it has registered."""

    def answers(self, message: Any) -> list[Any]:
        if isinstance(message, RegisterEngine | Ping):
            credit_address = 4096 * bool(self.got(RegisterEngine))
            return [AgentHello(self.name, self.incarnation, "host:1", credit_address)]
        return []


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


async def test_an_agent_that_knows_a_connection_no_more_is_registered_with_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "REGISTER_AGAIN_S", 0.5)
    agent = Agent("a0")
    links = AgentLinks({"a0": agent.endpoint}, keys("p0"), REGISTRATION, lambda *_: None)
    try:
        await until(links.linked)
        agent.received.clear()
        await until(lambda: agent.got(RegisterEngine) and links.linked())
    finally:
        links.close()
        await agent.close()


async def test_links_follow_the_gateways_list() -> None:
    first, second, moved = Agent("a0"), Agent("a1"), Agent("a1")
    left: list[str] = []
    links = AgentLinks({"a0": first.endpoint}, keys("p0"), REGISTRATION, lambda *_: None)
    links.on_left = left.append
    try:
        await until(lambda: links.linked() == ["a0"])
        links.meet(KnownAgents(7, {"a1": second.endpoint}, complete=False))
        await until(lambda: links.linked() == ["a0", "a1"] and links.heard == 7)
        links.meet(KnownAgents(8, {"a0": first.endpoint, "a1": moved.endpoint}, complete=True))
        await until(lambda: moved.got(RegisterEngine) and links.linked() == ["a0", "a1"])
        assert left == ["a1"]
        links.meet(KnownAgents(9, {"a1": moved.endpoint}, complete=True))
        await until(lambda: links.heard == 9)
        assert links.linked() == ["a1"] and left == ["a1", "a0"]
        assert not links.send("a0", Ping()) and links.incarnation("a0") is None
        assert links.send("a1", Ping())
    finally:
        links.close()
        for agent in (first, second, moved):
            await agent.close()
