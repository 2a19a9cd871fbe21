"""Processes of one test: an agent, engines, a gateway."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from common.messages.from_gateway import Subscribe
from tests.transfer.agent.agent_process import AgentProcess, FakeGateway, running_agent
from tests.transfer.agent.fake_engine import FakeEngine


@pytest.fixture
def slots() -> int:
    """DRAM slots of the agent."""
    return 64


@pytest.fixture
def agent(tmp_path, slots) -> Iterator[AgentProcess]:
    with running_agent(tmp_path, slots) as running:
        yield running


@pytest.fixture
def gateway(agent) -> Iterator[FakeGateway]:
    """Subscribed to the agent."""
    connected = FakeGateway(agent.control)
    connected.send(Subscribe())
    yield connected
    connected.close()


@pytest.fixture
def start_engine(agent) -> Iterator[Callable[..., FakeEngine]]:
    """``start_engine(name, ...)``: an engine that is registered with the agent."""
    started: list[FakeEngine] = []

    def start(name: str, **settings) -> FakeEngine:
        engine = FakeEngine(name, {"a0": agent.control}, **settings)
        started.append(engine)
        engine.wait_alive("a0")
        return engine

    yield start
    for engine in started:
        engine.kill()
