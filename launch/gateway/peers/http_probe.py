"""Whether the engines' HTTP ports answer: their control ports may, while those hang."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp

from launch.gateway.peers.engine_client import Call, EngineClient
from launch.gateway.peers.peer import EnginePeer

PROBE_S = 2.0
PROBE_DOWN_S = 0.5
"""Of one that does not answer: it may have started again."""
PROBE_TIMEOUT_S = 3.0
MISSES_MAX = 2
"""Probes in a row that an engine may let time out: one can be a busy machine."""


class HttpProbe:
    """Probes each engine for ever; ``tell(engine, alive)`` after each probe that says something."""

    def __init__(self, client: EngineClient, tell: Callable[[EnginePeer, bool], None]) -> None:
        self._client = client
        self._tell = tell
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """By engine."""

    def start(self) -> None:
        for engine in self._client.members.engines.values():
            self.watch(engine)

    def watch(self, engine: EnginePeer) -> None:
        """From now on."""
        self._tasks[engine.name] = asyncio.create_task(self._probe(engine))

    def forget(self, name: str) -> None:
        """The engine has left."""
        self._tasks.pop(name).cancel()

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _probe(self, engine: EnginePeer) -> None:
        misses = 0
        while True:
            try:
                asking = Call("GET", "/model_info")
                answer = await self._client.call(engine, asking, PROBE_TIMEOUT_S)
                misses = 0 if answer.status == 200 else MISSES_MAX
            except TimeoutError:
                misses += 1
            except aiohttp.ClientError:
                misses = MISSES_MAX
            if misses == 0 or misses >= MISSES_MAX:
                self._tell(engine, misses == 0)
            await asyncio.sleep(PROBE_S if misses < MISSES_MAX else PROBE_DOWN_S)
