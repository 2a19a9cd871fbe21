"""One attempt's HTTP: the same body to P and D, P's answer drained, D's relayed.

The client gets D's answer as it is. Whatever goes wrong before its first byte becomes
an ``AttemptFailed`` (worth another try) or an ``EngineRefused`` (the client's own fault).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import msgspec

from launch.gateway.control.engine_proxy import EngineProxy, sse_events
from launch.gateway.control.peers import EnginePeer
from launch.gateway.errors import AttemptFailed, BadRequest, EngineRefused, GatewayError
from launch.gateway.request.interruption import Interruptible
from launch.gateway.request.merge_answers import (
    add_input_logprobs,
    build_event,
    error_of,
    parse_event,
)
from launch.gateway.request.parts import CHAT, GENERATE, Part
from launch.gateway.request.trace import Trace

CHUNKS_MAX = 64
"""Chunks that wait for a slow client; then the engine's stream is read no further."""
DRAIN_S = 10.0
"""P's answer may come this long after D's."""


class Head(msgspec.Struct, frozen=True):
    """How an answer begins."""

    status: int
    content_type: str


class Outlet:
    """Where an answer goes: a head, then chunks, through a bounded queue."""

    def __init__(self, stream: bool) -> None:
        self.head: asyncio.Future[Head] = asyncio.get_running_loop().create_future()
        """Set with D's first byte, or to a ``GatewayError``."""
        self.aborted = False
        """The client asked the engines to end it: their abort is the answer."""
        self.first_token_s = 0.0
        """When (monotonic) it was there: with D's first byte, or P's answer if not streamed."""
        self._stream = stream
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue(CHUNKS_MAX)

    @property
    def opened(self) -> bool:
        return self.head.done()

    def open(self, status: int, content_type: str) -> None:
        self.head.set_result(Head(status, content_type))

    async def write(self, chunk: bytes) -> None:
        await self._chunks.put(chunk)

    async def close(self, error: GatewayError | None = None) -> None:
        """End the answer; an error after the first byte is its last event."""
        if error is not None and not self.opened:
            self.head.set_exception(error)
            self.head.exception()  # counts as seen, should the client be gone
        elif error is not None and self._stream:
            await self._chunks.put(error.event())
        await self._chunks.put(None)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body, after ``head``."""
        while (chunk := await self._chunks.get()) is not None:
            yield chunk


class Exchange:
    """Posts one body to P and D; D's answer goes to ``outlet``."""

    def __init__(self, proxy: EngineProxy, part: Part, outlet: Outlet, trace: Trace) -> None:
        self.prefilled = False
        """P is no longer needed."""
        self._proxy = proxy
        self._part = part
        self._outlet = outlet
        self._trace = trace
        self._posted_s = 0.0

    async def run(
        self,
        engines: tuple[EnginePeer, EnginePeer],
        body: dict[str, Any],
        block: Interruptible,
        now: float,
    ) -> asyncio.Task[bytes]:
        """Returns when D's answer is complete: the task of P's, to be drained."""
        self._posted_s = now
        prefill = asyncio.create_task(self._prefill(engines[0], body, block))
        try:
            with _engine_errors(engines[1]):
                async with self._proxy.post(engines[1], self._part.path, body) as answer:
                    if self._part.stream and answer.status < 400:
                        await self._relay_stream(engines[1], answer, prefill)
                    else:
                        await self._relay_whole(engines[1], answer, prefill)
        except BaseException:
            prefill.cancel()
            raise
        return prefill

    async def _prefill(
        self, engine: EnginePeer, body: dict[str, Any], block: Interruptible
    ) -> bytes:
        """P's whole answer; its failure ends ``block``, as long as D has not answered."""
        data = b""
        try:
            with _engine_errors(engine):
                async with self._proxy.post(engine, self._part.path, body) as answer:
                    data = await answer.read()
                self._check_whole(engine, answer, data)
        except (AttemptFailed, EngineRefused) as failure:
            if not self._outlet.opened:
                block.interrupt(failure)
            return data
        self.prefilled = True
        now = self._trace.clock("prefill", self._posted_s)
        if not self._part.stream:
            self._outlet.first_token_s = now
        return data

    # ---- what an answer says ----------------------------------------------------------

    def _check_whole(self, engine: EnginePeer, answer: aiohttp.ClientResponse, data: bytes) -> None:
        if 400 <= answer.status < 500:
            raise EngineRefused(answer.status, answer.content_type, data)
        if answer.status >= 500:
            excerpt = data[:500].decode(errors="replace")
            raise AttemptFailed(f"{engine.name} answered {answer.status}: {excerpt}")
        if not self._part.stream:
            self._check(engine, data)
            return
        for event in data.split(b"\n\n"):
            self._check(engine, event)

    def _check(self, engine: EnginePeer, data: bytes) -> None:
        """Raise if an answer or event says that the engine gave up. Most need no parsing."""
        if self._outlet.aborted or (b'"abort"' not in data and b'"error"' not in data):
            return
        value = parse_event(data) if self._part.stream else msgspec.json.decode(data)
        error = error_of(value)
        if error is None:
            return
        status, message = error
        if 400 <= status < 500:
            fields = {"message": message, "type": BadRequest.kind, "param": None, "code": status}
            refusal = msgspec.json.encode({"error": fields})
            raise EngineRefused(status, "application/json", refusal)
        raise AttemptFailed(f"{engine.name} gave up: {message}")

    # ---- D's answer -------------------------------------------------------------------

    def _open(self, answer: aiohttp.ClientResponse) -> None:
        now = self._trace.clock("first_byte", self._posted_s)
        self._outlet.first_token_s = self._outlet.first_token_s or now
        self._outlet.open(answer.status, answer.content_type)

    async def _relay_whole(
        self,
        engine: EnginePeer,
        answer: aiohttp.ClientResponse,
        prefill: asyncio.Task[bytes],
    ) -> None:
        data = await answer.read()
        self._check_whole(engine, answer, data)
        if self._needs_input_logprobs():
            prefill_answer = msgspec.json.decode(await prefill)
            merged = add_input_logprobs(msgspec.json.decode(data), prefill_answer)
            data = msgspec.json.encode(merged)
        self._open(answer)
        await self._outlet.write(data)

    async def _relay_stream(
        self,
        engine: EnginePeer,
        answer: aiohttp.ClientResponse,
        prefill: asyncio.Task[bytes],
    ) -> None:
        # SGLang begins a chat with an empty chunk that names the role, also when the
        # request has failed: the event behind it tells.
        held_events = 2 if self._part.path == CHAT else 1
        held: list[bytes] = []
        prefill_answer: Any = None
        async for events in sse_events(answer.content):
            if not self._outlet.opened:
                for event in events:
                    self._check(engine, event)
                held += events
                if len(held) < held_events:
                    continue
                if self._needs_input_logprobs():
                    prefill_answer = parse_event((await prefill).partition(b"\n\n")[0])
                self._open(answer)
                events = held
            if prefill_answer is not None:
                events = [_with_input_logprobs(event, prefill_answer) for event in events]
            await self._outlet.write(b"".join(events))
        if not self._outlet.opened:
            raise AttemptFailed(f"{engine.name} ended its stream without a token")

    def _needs_input_logprobs(self) -> bool:
        start = self._part.body.get("logprob_start_len")
        wanted = self._part.path == GENERATE and bool(self._part.body.get("return_logprob"))
        return wanted and isinstance(start, int) and start >= 0


@contextlib.contextmanager
def _engine_errors(engine: EnginePeer) -> Iterator[None]:
    try:
        yield
    except aiohttp.ClientError as error:
        raise AttemptFailed(f"{engine.name}: {error!r}", frozenset([engine.name])) from error
    except msgspec.DecodeError as error:
        raise AttemptFailed(f"{engine.name} sent no JSON: {error}") from error


def _with_input_logprobs(event: bytes, prefill_answer: dict[str, Any]) -> bytes:
    chunk = parse_event(event)
    if chunk is None:
        return event
    return build_event(add_input_logprobs(chunk, prefill_answer))


async def drain(prefill: asyncio.Task[bytes]) -> None:
    """Let P finish its answer: closing the connection would abort the request there."""
    _, late = await asyncio.wait({prefill}, timeout=DRAIN_S)
    for task in late:
        task.cancel()
