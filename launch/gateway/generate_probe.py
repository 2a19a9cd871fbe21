"""``/health_generate``: a real request of one token, past the cache."""

from __future__ import annotations

import asyncio
import time

from launch.gateway.admission import Seat
from launch.gateway.errors import Unavailable
from launch.gateway.request.parts import GENERATE, Part
from launch.gateway.request.walk import RequestWalk
from launch.gateway.services import Services

SEAT = Seat("health", parts=0, begun=True)
"""A tenant of its own, so no other's queue delays the probe; outside the bound on requests."""
TIMEOUT_S = 20.0
"""As SGLang's."""
_PROMPT = [1, 2, 3]


class GenerateProbe:
    """One request at a time, whoever asks: so many probes are no way around the bound."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._running: asyncio.Task[None] | None = None

    async def check(self) -> None:
        """Returns when a token has come; raises a ``GatewayError``."""
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._generate())
        await asyncio.shield(self._running)

    async def close(self) -> None:
        """End the request that nobody waits for any more."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})

    async def _generate(self) -> None:
        rid = f"health-generate-{time.monotonic_ns()}"
        part = Part(
            path=GENERATE,
            # With its id, so that no probe is taken for an earlier one that ended an engine.
            body={"rid": rid, "sampling_params": {"max_new_tokens": 1, "temperature": 0}},
            rid=rid,
            index=0,
            token_ids=_PROMPT,
        )
        walk = RequestWalk(self._services, part, SEAT, time.monotonic(), use_cache=False)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await walk.answer.head
                await walk.task
        except TimeoutError as error:
            raise Unavailable(f"no token within {TIMEOUT_S:g} s") from error
        finally:
            walk.cancel()
