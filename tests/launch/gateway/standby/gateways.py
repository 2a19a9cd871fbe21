"""Gateways beside the one of a stub cluster, each other's standbys."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import msgspec
import uvicorn
from aiohttp import ClientSession

from common.cluster.membership import EngineAddress, Role
from launch.gateway.app import create_app
from launch.gateway.config import GatewayConfig
from launch.gateway.listening import listen
from tests.control import SECRET
from tests.launch.gateway.registry.nodes import StubNode
from tests.launch.gateway.stubs import StubCluster, StubEngine

NOBODY = "http://127.0.0.1:9"
"""Where no gateway is."""


class Gateway:
    """One in the test's own loop, which can be made to fall silent."""

    def __init__(self, port: int, standby_of: Sequence[str], **config: Any) -> None:
        self.config = GatewayConfig(
            host="127.0.0.1",
            port=port,
            agents={},
            engines=[],
            control_secret=SECRET,
            standby_of=tuple(standby_of),
        )
        self.config = msgspec.structs.replace(self.config, **config)
        self.url = f"http://127.0.0.1:{port}"
        self.superseded = asyncio.Event()
        self.app = create_app(self.config, None, self.superseded.set)
        self._serving = uvicorn.Config(
            self.app, port=port, log_level="warning", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(self._serving)
        self._server.capture_signals = contextlib.nullcontext  # type: ignore[assignment]
        self.http = ClientSession(self.url)
        self.rooms: dict[int, asyncio.Event] = {}
        """Of the stubs that join."""

    @property
    def services(self) -> Any:
        return self.app.state.services

    @property
    def leadership(self) -> Any:
        return self.services.leadership

    async def start(self) -> None:
        self._task = asyncio.create_task(
            self._server.serve([listen(self._serving, self.config.client_stall_s)])
        )
        await until(lambda: self._server.started)

    def address_of(self, engine: StubEngine) -> EngineAddress:
        return StubCluster.address_of(cast(StubCluster, self), engine)

    def knows(self, *nodes: StubNode) -> bool:
        """All of them, well enough to plan with them."""
        members = self.services.plane.members
        names = {node.agent.name for node in nodes}
        return (
            members.agents.keys() >= names
            and not members.troubles()
            and all(members.agents[name].synced for name in names)
        )

    async def stop(self) -> None:
        """As a process that ends: nobody listens there any more."""
        self._server.should_exit = True
        await self._task
        await self.http.close()


@contextlib.asynccontextmanager
async def nodes_at(gateway: Gateway) -> AsyncIterator[tuple[StubNode, StubNode]]:
    """A prefill and a decode node that have joined it."""
    cluster = cast(StubCluster, gateway)
    nodes = StubNode(cluster, Role.PREFILL, "p0"), StubNode(cluster, Role.DECODE, "d0")
    try:
        for node in nodes:
            await node.join()
        await until(lambda: gateway.knows(*nodes))
        yield nodes
    finally:
        for node in nodes:
            await node.close()


async def until(condition: Any, timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running(*gateways: Gateway) -> AsyncIterator[None]:
    """Started one after the other."""
    started: list[Gateway] = []
    try:
        for gateway in gateways:
            await gateway.start()
            started.append(gateway)
        yield
    finally:
        for gateway in started:
            if not gateway.http.closed:
                await gateway.stop()
