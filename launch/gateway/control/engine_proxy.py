"""HTTP to the engines: one request to P and D, and the small calls around it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Iterable
from typing import Any

import aiohttp
import msgspec

from launch.gateway.control.control_plane import ControlPlane
from launch.gateway.control.peers import EnginePeer
from launch.gateway.errors import EngineRefused, RequestFailed, Unavailable

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 10.0
"""Tokenising, model information, flushing."""
ABORT_TIMEOUT_S = 2.0
POLL_S = 2.0
POLL_TIMEOUT_S = 3.0
POLL_MISSES_MAX = 2
"""Polls in a row that an engine may let time out: one can be a busy machine."""
EVENT_BYTES_MAX = 256 << 20
_JSON = {"content-type": "application/json"}


class EngineProxy:
    """HTTP client of all engines; also polls whether they answer at all."""

    def __init__(self, plane: ControlPlane, connections_max: int) -> None:
        self._plane = plane
        self._turn = itertools.count()
        # A kept connection that the engine closes at the same moment fails a POST.
        connector = aiohttp.TCPConnector(limit=connections_max, force_close=True)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=_timeout(None), read_bufsize=1 << 20
        )
        self._polls: list[asyncio.Task[None]] = []

    def start(self) -> None:
        for engine in self._plane.engines.values():
            self._polls.append(asyncio.create_task(self._poll(engine)))

    async def close(self) -> None:
        for task in self._polls:
            task.cancel()
        await asyncio.gather(*self._polls, return_exceptions=True)
        await self._session.close()

    @contextlib.asynccontextmanager
    async def post(
        self, engine: EnginePeer, path: str, body: dict[str, Any]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """POST a request to an engine, or to one of its attention groups, without a total
        timeout: the caller limits the request as a whole."""
        if engine.address.group is not None:
            body = body | {"routed_dp_rank": engine.address.group}
        url = engine.address.http + path
        async with self._session.post(url, data=msgspec.json.encode(body), headers=_JSON) as answer:
            yield answer

    async def abort(self, engines: Iterable[EnginePeer], body: dict[str, Any]) -> None:
        """``/abort_request`` at each engine; one that does not answer is left alone."""

        async def one(engine: EnginePeer) -> None:
            try:
                await self._call(engine, "POST", "/abort_request", body, ABORT_TIMEOUT_S)
            except (aiohttp.ClientError, TimeoutError) as error:
                log.info("abort not delivered engine=%s error=%r", engine.name, error)

        await asyncio.gather(*(one(engine) for engine in engines))

    async def tokenize(self, body: dict[str, Any]) -> bytes:
        """``/v1/tokenize`` of a live engine; 4xx raises ``EngineRefused``."""
        return (await self.ask_any("POST", "/v1/tokenize", body))[1]

    async def ask_any(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> tuple[str, bytes]:
        """Content type and body from the first live engine that answers 200."""
        engines = self._plane.live_engines()
        if not engines:
            raise Unavailable("no engine is alive")
        first = next(self._turn)
        reasons = []
        for offset in range(len(engines)):
            engine = engines[(first + offset) % len(engines)]
            try:
                status, kind, answer = await self._call(engine, method, path, body)
            except (aiohttp.ClientError, TimeoutError) as error:
                reasons.append(f"{engine.name}: {error!r}")
                continue
            if status < 400:
                return kind, answer
            if status < 500:
                raise EngineRefused(status, kind, answer)
            reasons.append(f"{engine.name}: status {status}")
        raise RequestFailed(f"{path} failed on every engine ({'; '.join(reasons)})")

    async def flush(self) -> dict[str, str]:
        """Flush every engine's cache; engine name -> reason for those that did not. The attention
        groups of an engine flush together."""
        engines = [e for e in self._plane.engines.values() if not e.address.group]
        reasons = await asyncio.gather(*map(self._flush_one, engines))
        return {
            engine.name: reason
            for engine, reason in zip(engines, reasons, strict=True)
            if reason is not None
        }

    async def _flush_one(self, engine: EnginePeer) -> str | None:
        """Why it did not, or None."""
        try:
            status, _, answer = await self._call(engine, "POST", "/flush_cache", None)
        except (aiohttp.ClientError, TimeoutError) as error:
            return repr(error)
        return None if status == 200 else answer.decode(errors="replace").strip()

    async def _call(
        self,
        engine: EnginePeer,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> tuple[int, str, bytes]:
        data = msgspec.json.encode(body) if body is not None else None
        async with self._session.request(
            method,
            engine.address.http + path,
            data=data,
            headers=_JSON if data is not None else None,
            timeout=_timeout(timeout_s),
        ) as answer:
            return answer.status, answer.content_type, await answer.read()

    async def _poll(self, engine: EnginePeer) -> None:
        misses = 0
        while True:
            try:
                status, _, _ = await self._call(engine, "GET", "/model_info", None, POLL_TIMEOUT_S)
                misses = 0 if status == 200 else POLL_MISSES_MAX
            except TimeoutError:
                misses += 1
            except aiohttp.ClientError:
                misses = POLL_MISSES_MAX
            if misses == 0 or misses >= POLL_MISSES_MAX:
                self._plane.http_state(engine, misses == 0)
            await asyncio.sleep(POLL_S)


def _timeout(total_s: float | None) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=total_s, sock_connect=CONNECT_TIMEOUT_S)


async def sse_events(stream: aiohttp.StreamReader) -> AsyncIterator[list[bytes]]:
    """Whole server-sent events (each with its blank line), as many at once as have arrived."""
    rest = b""
    async for chunk in stream.iter_any():
        *events, rest = (rest + chunk).split(b"\n\n")
        if events:
            yield [event + b"\n\n" for event in events]
        if len(rest) > EVENT_BYTES_MAX:
            raise RequestFailed(f"an event of more than {EVENT_BYTES_MAX} bytes")
    if rest.strip():
        yield [rest + b"\n\n"]
