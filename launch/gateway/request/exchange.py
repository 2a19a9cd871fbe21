"""One attempt's HTTP: the same body to P and D, P's answer drained, D's relayed.

The client gets D's answer as it is. Whatever goes wrong before its first byte becomes
an ``AttemptFailed`` (worth another try) or an ``EngineRefused`` (the client's own fault).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping

import aiohttp
import msgspec

from common.ids import GAVE_UP_STATUS, PLAN_OUTDATED
from common.json import JsonObject
from common.tracing.spans import Span
from launch.gateway.errors import Aborted, AttemptFailed, EngineRefused, PlanStale
from launch.gateway.peers.engine_client import UNPROCESSABLE_STATUS, EngineClient, sse_events
from launch.gateway.peers.peer import EnginePeer
from launch.gateway.request.aborted import has_tokens, is_ordered, was_ordered
from launch.gateway.request.answer import Answer
from launch.gateway.request.cancel_scope import CancelScope
from launch.gateway.request.merge_answers import (
    EngineAnswer,
    add_input_logprobs,
    build_event,
    cannot_be_met,
    error_of,
    in_one_shape,
    parse_event,
)
from launch.gateway.request.parts import CHAT, GENERATE, MESSAGES, OF_EVENTS, RESPONSES, Part
from launch.gateway.request.trace import Trace

DRAIN_S = 10.0
"""P's answer may come this long after D's."""
_HELD_EVENTS = {CHAT: 2, MESSAGES: 2, RESPONSES: 3}
"""SGLang begins these with events that say nothing yet, also when the request has failed: the
one behind them tells."""


class Exchange:
    """Posts one body to P and D; D's response becomes ``answer``."""

    def __init__(
        self, client: EngineClient, part: Part, answer: Answer, trace: Trace, span: Span
    ) -> None:
        """``span``: of which the engines' own are to be children."""
        self.prefilled = False
        """P is no longer needed."""
        self.on_prefilled: Callable[[], None] = lambda: None
        self._client = client
        self._part = part
        self._answer = answer
        self._trace = trace
        self._span = span
        self._headers: Mapping[str, str] = {}
        self._is_ordered = False
        """P was told to end it: what becomes of it at D is no failure."""
        self._posted_s = 0.0
        self._rid = b""

    async def run(
        self,
        engines: tuple[EnginePeer, EnginePeer],
        body: JsonObject,
        scope: CancelScope,
        now: float,
    ) -> asyncio.Task[bytes]:
        """Returns when D's answer is complete: the task of P's, to be drained."""
        self._posted_s = now
        rid = str(body["rid"])
        self._rid = rid.encode()
        self._headers = {**self._span.headers, **self._part.engine_headers(rid)}
        prefill = asyncio.create_task(self._prefill(engines[0], body, scope))
        try:
            with _engine_errors(engines[1]):
                path, headers = self._part.path, self._headers
                async with self._client.post(engines[1], path, body, headers) as response:
                    if self._part.stream and response.status < 400:
                        await self._relay_stream(engines[1], response, prefill)
                    else:
                        await self._relay_whole(engines[1], response, prefill)
        except BaseException:
            # However it failed, or was cancelled: nobody will drain P's answer.
            prefill.cancel()
            raise
        return prefill

    async def _prefill(self, engine: EnginePeer, body: JsonObject, scope: CancelScope) -> bytes:
        """P's whole answer; its failure ends ``scope``, as long as D has not answered."""
        data = b""
        try:
            with _engine_errors(engine):
                path, headers = self._part.path, self._headers
                async with self._client.post(engine, path, body, headers) as response:
                    data = self._for_client(await response.read())
                self._check_whole(engine, response, data)
        except Aborted:  # D ends it as well, with the tokens that it has
            self._is_ordered = True
            return data
        except (AttemptFailed, EngineRefused) as failure:
            if not self._answer.opened:
                scope.cancel(failure)
            return data
        self.prefilled = True
        self.on_prefilled()
        now = self._trace.clock("prefill", self._posted_s)
        self._span.note("prefill", self._posted_s)
        if not self._part.stream:
            self._answer.first_token_s = now
        return data

    def _for_client(self, data: bytes) -> bytes:
        """With the client's id where the engines wrote theirs, which nothing else can equal."""
        return data.replace(self._rid, msgspec.json.encode(self._part.rid)[1:-1])

    # ---- what an answer says ----------------------------------------------------------

    def _check_whole(
        self, engine: EnginePeer, response: aiohttp.ClientResponse, data: bytes
    ) -> None:
        gave_up = response.status == GAVE_UP_STATUS
        if 400 <= response.status < 500 and not gave_up:
            raise EngineRefused(response.status, data)
        if gave_up or response.status >= 500:
            excerpt = data[:500].decode(errors="replace")
            if self._is_ordered or was_ordered(excerpt):
                raise Aborted(f"{engine.name} was told to end it")
            if cannot_be_met(excerpt):
                raise EngineRefused(UNPROCESSABLE_STATUS, data)
            raise _failure(f"{engine.name} answered {response.status}: {excerpt}")
        if not self._part.stream:
            self._check(engine, data)
            return
        for event in data.split(b"\n\n"):
            self._check(engine, event)

    def _check(self, engine: EnginePeer, data: bytes) -> None:
        """Raise if an answer or event says that the engine gave up. Most need no parsing."""
        if b'"abort"' not in data and b'"error"' not in data:
            return
        value = parse_event(data) if self._part.stream else msgspec.json.decode(data)
        error = error_of(value)
        if value is None or error is None:
            return
        if is_ordered(value) or (self._is_ordered and engine.address.role == "decode"):
            if engine.address.role == "prefill" or not has_tokens(value):
                raise Aborted(f"{engine.name} was told to end it")
            return
        if self._answer.aborted:
            return
        status, message = error
        if cannot_be_met(message):
            status = UNPROCESSABLE_STATUS
        if 400 <= status < 500:
            raise EngineRefused(status, msgspec.json.encode({"message": message}))
        raise _failure(f"{engine.name} gave up: {message}")

    # ---- D's answer -------------------------------------------------------------------

    def _open(self, response: aiohttp.ClientResponse) -> None:
        now = self._trace.clock("first_byte", self._posted_s)
        self._span.note("first byte", self._posted_s)
        self._answer.first_token_s = self._answer.first_token_s or now
        self._answer.open(response.status, response.content_type)

    async def _relay_whole(
        self,
        engine: EnginePeer,
        response: aiohttp.ClientResponse,
        prefill: asyncio.Task[bytes],
    ) -> None:
        data = self._for_client(await response.read())
        self._check_whole(engine, response, data)
        if self._needs_input_logprobs():
            prefill_answer = msgspec.json.decode(await prefill)
            merged = add_input_logprobs(msgspec.json.decode(data), prefill_answer)
            data = msgspec.json.encode(merged)
        self._open(response)
        await self._answer.write(data)

    async def _relay_stream(
        self,
        engine: EnginePeer,
        response: aiohttp.ClientResponse,
        prefill: asyncio.Task[bytes],
    ) -> None:
        held_events = _HELD_EVENTS.get(self._part.path, 1)
        held: list[bytes] = []
        prefill_answer: EngineAnswer | None = None
        async for received in sse_events(response.content):
            events = [self._for_client(event) for event in received]
            if not self._answer.opened:
                for event in events:
                    self._check(engine, event)
                held += events
                if len(held) < held_events:
                    continue
                if self._needs_input_logprobs():
                    prefill_answer = parse_event((await prefill).partition(b"\n\n")[0])
                self._open(response)
                events = held
            if self._part.path not in OF_EVENTS:
                events = [in_one_shape(event) for event in events]
            if prefill_answer is not None:
                events = [_with_input_logprobs(event, prefill_answer) for event in events]
            await self._answer.write(b"".join(events))
        if not self._answer.opened:
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
        raise AttemptFailed(f"{engine.name}: {error!r}") from error
    except msgspec.DecodeError as error:
        raise AttemptFailed(f"{engine.name} sent no JSON: {error}") from error


def _failure(what: str) -> AttemptFailed:
    """Of an engine that has said why."""
    return PlanStale(what) if PLAN_OUTDATED in what else AttemptFailed(what)


def _with_input_logprobs(event: bytes, prefill_answer: EngineAnswer) -> bytes:
    chunk = parse_event(event)
    if chunk is None:
        return event
    return build_event(add_input_logprobs(chunk, prefill_answer))


async def drain(prefill: asyncio.Task[bytes]) -> None:
    """Let P finish its answer: closing the connection would abort the request there."""
    _, late = await asyncio.wait({prefill}, timeout=DRAIN_S)
    for task in late:
        task.cancel()
