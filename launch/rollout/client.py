"""The endpoint as a job needs it: tokenise, generate from token ids, try again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import TypeAlias, TypeVar

import aiohttp
import msgspec

from common.json import JsonObject
from launch.access import NO_KEY, Access
from launch.gateway.request.trace import HEADER
from launch.gateways import NOT_ACTIVE, Gateways
from launch.rollout.answers import Generation, decoded, generation_of
from launch.rollout.errors import EndpointGone, RequestFailed

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
KEEPALIVE_S = 2.0
"""An idle connection is closed before any server does: a POST that meets its end fails."""
CALL_TIMEOUT_S = 30.0
"""Tokenising, model information."""
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.5, 15.0
FULL_WAIT_MAX_S = 3600.0
"""For so long a request is sent again to a cluster that answers 429."""
CONCURRENCY_UNKNOWN = 64
"""Requests in flight where the endpoint does not say how many it admits."""


class Tokens(msgspec.Struct):
    tokens: list[int]


class _Text(msgspec.Struct):
    text: str


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Health(msgspec.Struct):
    weight_version: str


class _Requests(msgspec.Struct):
    admitted_max: int


class _Cluster(msgspec.Struct):
    requests: _Requests


JSON_HEADERS = {"content-type": "application/json"}
T = TypeVar("T")
_Asked: TypeAlias = AbstractAsyncContextManager[aiohttp.ClientResponse]


class Client:
    """HTTP to one cluster, whose gateways are at ``urls``; :meth:`close` it."""

    def __init__(
        self, urls: Iterable[str], timeout_s: float, retry_s: float, access: Access = NO_KEY
    ) -> None:
        self._gateways = Gateways(urls)
        self._retry_s = retry_s
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ssl=access.tls())
        self._http = aiohttp.ClientSession(
            connector=connector,
            headers=access.headers,
            read_bufsize=1 << 20,
        )
        self._run = uuid.uuid4().hex[:8]
        self._live: dict[str, str] = {}
        """Ids of requests that are not answered, by name."""
        self.in_flight = 0
        """Generations sent and not answered; one that waits to be sent again is not."""
        self.on_in_flight: Callable[[int], None] = lambda _: None
        """Called at each change of that number."""
        self.retries = 0
        self.full = 0
        """Answers 429."""
        self._answered_s = -math.inf

    async def close(self) -> None:
        await self._http.close()

    async def model(self) -> str:
        """The name of what is served; raises :class:`RequestFailed`."""
        models = await self._get("v1/models", _Models)
        if not models.data:
            raise RequestFailed("the endpoint serves no model")
        return models.data[0].id

    async def concurrency(self) -> int:
        """How many requests the cluster admits at once."""
        try:
            return (await self._get("admin/cluster", _Cluster)).requests.admitted_max
        except RequestFailed:
            return CONCURRENCY_UNKNOWN

    async def tokenize(self, **fields: object) -> list[int]:
        """``/v1/tokenize`` of a ``prompt`` or of ``messages``; raises :class:`RequestFailed`."""
        timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT_S)
        answer, _ = await self._post("v1/tokenize", fields, "tokenize", timeout)
        return decoded(answer.content, Tokens).tokens

    async def detokenize(self, token_ids: list[int], skip_special: bool = False) -> str:
        """``/v1/detokenize``; raises :class:`RequestFailed`."""
        timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT_S)
        fields: JsonObject = {"tokens": token_ids, "skip_special_tokens": skip_special}
        answer, _ = await self._post("v1/detokenize", fields, "detokenize", timeout)
        return decoded(answer.content, _Text).text

    async def generate(
        self, token_ids: list[int], sampling: JsonObject, logprobs: bool, name: str
    ) -> Generation:
        """Continue ``token_ids``; raises :class:`RequestFailed`. ``name`` is for logs and the
        request's id."""
        body: JsonObject = {
            "input_ids": token_ids,
            "sampling_params": sampling,
            "return_logprob": logprobs,
        }
        begun_s = time.monotonic()
        answer, attempts = await self._post("generate", body, name, self._timeout)
        generation = generation_of(answer.content, answer.trace, logprobs)
        generation.attempts, generation.seconds = attempts, time.monotonic() - begun_s
        return generation

    async def abort(self, name: str) -> bool:
        """Have the request of that ``name`` answered with the tokens that it has, soon; False if
        there is none, or nobody to tell."""
        if (rid := self._live.get(name)) is None:
            return False
        timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT_S)
        answer = await self._attempt("abort_request", {"rid": rid}, timeout)
        return answer.status == 200

    async def weight_version(self) -> str:
        """Of the weights that are served; raises :class:`RequestFailed`."""
        return (await self._get("health", _Health)).weight_version

    async def _get(self, path: str, kind: type[T]) -> T:
        timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT_S)
        answer = await self._round(lambda url: self._http.get(f"{url}/{path}", timeout=timeout))
        if answer.status != 200:
            raise RequestFailed(f"/{path}: {answer.reason}")
        return decoded(answer.content, kind)

    async def _post(
        self, path: str, body: JsonObject, name: str, timeout: aiohttp.ClientTimeout
    ) -> tuple[_HttpAnswer, int]:
        """The first good answer, and the attempts that it took."""
        patience = Patience(self._retry_s)
        for attempt in itertools.count(1):
            with self._id(path, name, attempt) as rid:
                answer = await self._attempt(path, body | rid, timeout)
            if answer.status == 200:
                return answer, attempt
            if 400 <= answer.status < 500 and answer.status != 429:
                raise RequestFailed(answer.reason)
            full = answer.status == 429
            self.full += full
            self.retries += not full
            pause_s = patience.pause_s(full, answer.retry_after_s)
            if pause_s is None:
                raise self._given_up(patience, answer.reason)
            log.info(
                "retry request=%s attempt=%d in_s=%.2f: %s", name, attempt, pause_s, answer.reason
            )
            await asyncio.sleep(pause_s)
        raise AssertionError

    @contextlib.contextmanager
    def _id(self, path: str, name: str, attempt: int) -> Iterator[JsonObject]:
        """Of an attempt: the last one may still be known to the gateway."""
        if path != "generate":
            yield {}
            return
        self._live[name] = f"{self._run}-{name}-{attempt}"
        try:
            yield {"rid": self._live[name]}
        finally:
            del self._live[name]

    async def _attempt(
        self, path: str, body: JsonObject, timeout: aiohttp.ClientTimeout
    ) -> _HttpAnswer:
        data = msgspec.json.encode(body)
        self._sent(path, 1)
        try:
            answer = await self._round(
                lambda url: self._http.post(
                    f"{url}/{path}", data=data, headers=JSON_HEADERS, timeout=timeout
                )
            )
        finally:
            self._sent(path, -1)
        if 0 < answer.status < 500:
            self._answered_s = time.monotonic()
        return answer

    async def _round(self, ask: Callable[[str], _Asked]) -> _HttpAnswer:
        """Of the first gateway that answers as an active one, or else what all of them said."""
        said: list[_HttpAnswer] = []
        for url in self._gateways:
            try:
                async with ask(url) as answer:
                    said.append(_http_answer(url, answer, await answer.read()))
            except (aiohttp.ClientError, TimeoutError) as error:
                said.append(_HttpAnswer(0, f"{url}: {error!r}"))
            if said[-1].status not in (0, NOT_ACTIVE):
                self._gateways.answered(url)
                return said[-1]
        worst = max(said, key=lambda each: each.status)
        return msgspec.structs.replace(worst, reason="; ".join(each.reason for each in said))

    def _sent(self, path: str, change: int) -> None:
        if path == "generate":
            self.in_flight += change
            self.on_in_flight(self.in_flight)

    def _given_up(self, patience: Patience, reason: str) -> Exception:
        text = f"given up after {patience.waited_s:.0f} s: {reason}"
        if self._answered_s < patience.failing_since_s:
            return EndpointGone(f"the endpoint serves nobody; {text}")
        return RequestFailed(text)


class _HttpAnswer(msgspec.Struct):
    """``status`` 0: there was none."""

    status: int
    reason: str
    content: bytes = b""
    trace: str = "{}"
    retry_after_s: float = 0.0


def _http_answer(url: str, answer: aiohttp.ClientResponse, content: bytes) -> _HttpAnswer:
    return _HttpAnswer(
        answer.status,
        f"{url}: HTTP {answer.status}: {excerpt(content)}" if answer.status != 200 else "",
        content,
        answer.headers.get(HEADER, "{}"),
        seconds_of(answer.headers.get("retry-after")),
    )


class Patience:
    """How long to wait before the next attempt, and when to stop."""

    def __init__(self, retry_s: float) -> None:
        self._begun_s = self.failing_since_s = time.monotonic()
        self._retry_s = retry_s
        self._backoff_s = 0.0

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self._begun_s

    def pause_s(self, full: bool, retry_after_s: float) -> float | None:
        """None to give up. ``full``: the cluster works, and takes no more for now."""
        now = time.monotonic()
        if full:
            self._backoff_s = 0.0
        elif not self._backoff_s:
            self._backoff_s, self.failing_since_s = BACKOFF_FIRST_S, now
        else:
            self._backoff_s = min(2 * self._backoff_s, BACKOFF_MAX_S)
        failing_s = 0.0 if full else now - self.failing_since_s
        if failing_s > self._retry_s or self.waited_s > FULL_WAIT_MAX_S + self._retry_s:
            return None
        return max(retry_after_s, self._backoff_s, BACKOFF_FIRST_S) * random.uniform(0.7, 1.3)


def seconds_of(retry_after: str | None) -> float:
    """0 where the header is missing, or a date."""
    return float(retry_after) if retry_after and retry_after.isdecimal() else 0.0


def excerpt(data: bytes) -> str:
    return data[:300].decode(errors="replace")
