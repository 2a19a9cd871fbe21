"""HTTP to the engines: one request to P and D, and the small calls around it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from common.ids import PROMPT_IDS_HEADER
from common.json import JsonObject
from launch.gateway.errors import EngineRefused, RequestFailed, Unavailable
from launch.gateway.peers.membership import Membership
from launch.gateway.peers.peer import EnginePeer

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 10.0
"""Tokenising, model information, flushing."""
ABORT_TIMEOUT_S = 2.0
REFUSAL_TIMEOUT_S = 2.0
"""An engine that answers later than this to a call has not died."""
UNPROCESSABLE_STATUS = 422
EVENT_BYTES_MAX = 256 << 20
_JSON = {"content-type": "application/json"}
_OF_A_QUERY = "%&=+/?:;,@!$'()*~[]"
"""Characters of a query string, which is passed on as it came."""


class Call(msgspec.Struct, frozen=True):
    """A small request to an engine."""

    method: str
    path: str
    body: JsonObject | None = None
    query: str = ""
    headers: Mapping[str, str] = {}


class HttpAnswer(msgspec.Struct, frozen=True):
    """An engine's whole answer."""

    status: int
    content_type: str
    body: bytes


class EngineClient:
    """HTTP client of all engines."""

    def __init__(self, members: Membership, connections_max: int, key: str = "") -> None:
        """``key``: the engines', if they have one."""
        self.members = members
        self._turn = itertools.count()
        # A kept connection that the engine closes at the same moment fails a POST.
        connector = aiohttp.TCPConnector(limit=connections_max, force_close=True)
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=_timeout(None),
            read_bufsize=1 << 20,
            headers={"authorization": f"Bearer {key}"} if key else None,
        )

    async def close(self) -> None:
        await self._session.close()

    @contextlib.asynccontextmanager
    async def post(
        self, engine: EnginePeer, path: str, body: JsonObject, headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """POST a request to an engine, or to one of its attention groups, without a total
        timeout: the caller limits the request as a whole."""
        if engine.address.group is not None:
            body = body | {"routed_dp_rank": engine.address.group}
        url = engine.address.http + path
        data = msgspec.json.encode(body)
        async with self._session.post(url, data=data, headers={**_JSON, **headers}) as answer:
            yield answer

    async def abort(self, engines: Iterable[EnginePeer], body: JsonObject) -> None:
        """``/abort_request`` at each engine; one that does not answer is left alone."""

        async def one(engine: EnginePeer) -> None:
            try:
                await self.call(engine, Call("POST", "/abort_request", body), ABORT_TIMEOUT_S)
            except (aiohttp.ClientError, TimeoutError) as error:
                log.info("abort not delivered engine=%s error=%r", engine.name, error)

        await asyncio.gather(*(one(engine) for engine in engines))

    async def refuses(self, engine: EnginePeer) -> bool:
        """Whether nobody listens there any more, or the connection is cut."""
        try:
            await self.call(engine, Call("GET", "/model_info"), REFUSAL_TIMEOUT_S)
        except TimeoutError:
            return False  # it may be slow, or suspended
        except aiohttp.ClientError:
            return True
        return False

    async def tokenize(self, body: JsonObject) -> bytes:
        """``/v1/tokenize`` of a live engine; 4xx raises ``EngineRefused``."""
        return (await self.ask_any(Call("POST", "/v1/tokenize", body))).body

    async def prompt_ids(self, path: str, body: JsonObject) -> bytes:
        """Of the prompt that a generating route makes of a body, likewise."""
        asking = {PROMPT_IDS_HEADER: "1"}
        return (await self.ask_any(Call("POST", path, body, headers=asking))).body

    async def ask_any(self, call: Call) -> HttpAnswer:
        """The answer of the first live engine that gives one; 4xx raises ``EngineRefused``, as do
        failures of all of them with the same body; ``Unavailable`` if none has got it."""
        engines = self.members.live_engines()
        if not engines:
            raise Unavailable("no engine is alive")
        first = next(self._turn)
        reasons = []
        unreached = 0
        failed: list[HttpAnswer] = []
        for offset in range(len(engines)):
            engine = engines[(first + offset) % len(engines)]
            try:
                answer = await self.call(engine, call)
            except (aiohttp.ClientError, TimeoutError) as error:
                reasons.append(f"{engine.name}: {error!r}")
                unreached += isinstance(error, aiohttp.ClientConnectorError)
                continue
            if answer.status < 400:
                return answer
            if answer.status < 500:
                raise EngineRefused(answer.status, answer.body)
            reasons.append(f"{engine.name}: status {answer.status}")
            failed.append(answer)
        if call.body is not None and len(failed) == len(engines):
            # SGLang answers 500 where a chat template cannot take a request.
            raise EngineRefused(UNPROCESSABLE_STATUS, failed[-1].body)
        message = f"{call.path} failed on every engine ({'; '.join(reasons)})"
        if unreached == len(engines):  # killed, which is not known yet
            raise Unavailable(message)
        raise RequestFailed(message)

    async def ask_one(self, name: str, call: Call, timeout_s: float) -> HttpAnswer:
        """An engine's answer, of whatever status."""
        engine = self.members.engines[name]
        try:
            return await self.call(engine, call, timeout_s)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise RequestFailed(f"{name} did not answer: {error!r}") from error

    async def flush(self, wait_s: float = 0.0) -> dict[str, str]:
        """Flush every engine's cache; engine name -> reason for those that did not. The attention
        groups of an engine flush together. ``wait_s``: for requests there to end."""
        engines = [e for e in self.members.engines.values() if not e.address.group]
        reasons = await asyncio.gather(*(self._flush_one(engine, wait_s) for engine in engines))
        return {
            engine.name: reason
            for engine, reason in zip(engines, reasons, strict=True)
            if reason is not None
        }

    async def _flush_one(self, engine: EnginePeer, wait_s: float) -> str | None:
        """Why it did not, or None."""
        call = Call("POST", "/flush_cache", query=f"timeout={wait_s:g}" if wait_s else "")
        try:
            answer = await self.call(engine, call, CALL_TIMEOUT_S + wait_s)
        except (aiohttp.ClientError, TimeoutError) as error:
            return repr(error)
        return None if answer.status == 200 else answer.body.decode(errors="replace").strip()

    async def call(
        self, engine: EnginePeer, call: Call, timeout_s: float = CALL_TIMEOUT_S
    ) -> HttpAnswer:
        """Its answer; raises aiohttp's ``ClientError``, and ``TimeoutError``."""
        data = msgspec.json.encode(call.body) if call.body is not None else None
        target = quote(call.path)
        if call.query:
            target += f"?{quote(call.query, safe=_OF_A_QUERY)}"
        async with self._session.request(
            call.method,
            # Encoded: yarl would resolve dots, and so lead to another route of the engine.
            URL(engine.address.http + target, encoded=True),
            data=data,
            headers={**(_JSON if data is not None else {}), **call.headers},
            timeout=_timeout(timeout_s),
        ) as answer:
            return HttpAnswer(answer.status, answer.content_type, await answer.read())


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
