"""Clients that generate while weights are updated, as rollout workers do: what a pause has cut is
sent again with the tokens that it has."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec

from benchmarks.clients.reference import VOCABULARY, sampling
from benchmarks.own_cluster import ClusterFailed
from benchmarks.weights.cases import BEFORE
from launch.cluster.layout import PAGE_TOKENS
from launch.gateway.request.trace import HEADER
from launch.rollout.answers import SglangSpan

CLIENTS = 6
CONVERSATIONS = 6
TURNS = 3
SALTS = ("a", "b")
NEW_TOKENS = 96
STREAMED = 0.75
WAIT_TIMEOUT_S = 120.0
LOOK_S = 0.01
ABORTED = "abort"
"""SGLang's type of the finish reason."""


class Piece(msgspec.Struct):
    """One answer. Times are the monotonic clock's."""

    prompt: list[int]
    wanted: int
    """Tokens."""
    sent_s: float
    done_s: float = 0.0
    tokens: list[int] = []
    spans: list[SglangSpan] = []
    reason: str = ""
    cached_tokens: int = 0
    events: list[tuple[float, int]] = []
    """Of a stream: when each event came, and how many tokens there were by then."""
    engines: tuple[str, ...] = ()
    lost: str = ""
    """What came instead of the tokens that were asked for."""

    def first_token_s(self, version: str) -> float | None:
        """When the first token of these weights came; None if there is none."""
        starts = [span.start for span in self.spans if span.version == version]
        if not starts or starts[0] >= len(self.tokens):
            return None
        return min([s for s, count in self.events if count > starts[0]], default=self.done_s)


class Clients:
    """``start``, use, ``stop``, as often as it is wanted; ``pieces`` grows."""

    def __init__(self, http: aiohttp.ClientSession, url: str, seed: int) -> None:
        rng = random.Random(seed)
        self.pieces: list[Piece] = []
        self.apart = ""
        """What is sent from now on shares no KV with what was sent under another such word."""
        self._http, self._url = http, url
        self._prompts = [
            rng.choices(VOCABULARY, k=rng.randint(200, 1400)) for _ in range(CONVERSATIONS)
        ]
        self._rngs = [random.Random(f"{seed} {number}") for number in range(CLIENTS)]
        self._under_way: list[Piece] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._is_stopping = False

    def start(self) -> None:
        self._is_stopping = False
        self._tasks = [asyncio.create_task(self._converse(rng)) for rng in self._rngs]

    async def stop(self) -> None:
        """Once what is under way has ended."""
        self._is_stopping = True
        await asyncio.gather(*self._tasks)

    async def wait_decoding(self, count: int) -> None:
        """Until so many streams have tokens, and lack some."""

        def holds() -> bool:
            return sum(len(piece.events) > 1 for piece in self._under_way) >= count

        await self._until(holds, f"{count} requests decode")

    async def wait_answers(self, count: int, sent_after_s: float) -> None:
        def holds() -> bool:
            return sum(piece.sent_s > sent_after_s for piece in self.pieces) >= count

        await self._until(holds, f"{count} answers under the new weights")

    async def _until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_TIMEOUT_S
        while not holds():
            for task in self._tasks:
                if task.done():
                    task.result()
            if time.monotonic() > deadline:
                lost = {piece.lost for piece in self.pieces if piece.lost}
                raise ClusterFailed(f"{what}: not within {WAIT_TIMEOUT_S:g} s; lost: {lost}")
            await asyncio.sleep(LOOK_S)

    async def _converse(self, rng: random.Random) -> None:
        while not self._is_stopping:
            number = rng.randrange(CONVERSATIONS)
            prompt, salt = self._prompts[number], rng.choice(SALTS)
            for turn in range(TURNS):
                answer = await self._answer(prompt, salt, rng.random() < STREAMED)
                if answer is None or self._is_stopping:
                    break
                more = random.Random(f"{number} {turn}").choices(VOCABULARY, k=PAGE_TOKENS // 2)
                prompt = prompt + answer + more

    async def _answer(self, prompt: list[int], salt: str, stream: bool) -> list[int] | None:
        """All tokens, in as many pieces as pauses make of it; None if some are lost."""
        tokens: list[int] = []
        while len(tokens) < NEW_TOKENS:
            piece = Piece(prompt + tokens, NEW_TOKENS - len(tokens), time.monotonic())
            self._under_way.append(piece)
            await self._ask(piece, salt, stream)
            self._under_way.remove(piece)
            self.pieces.append(piece)
            if piece.lost:
                return None
            tokens = tokens + piece.tokens
        return tokens

    async def _ask(self, piece: Piece, salt: str, stream: bool) -> None:
        body = {
            "input_ids": piece.prompt,
            "sampling_params": sampling(piece.wanted),
            "cache_salt": salt + self.apart,
            "stream": stream,
        }
        try:
            async with self._http.post(f"{self._url}/generate", json=body) as response:
                trace = msgspec.json.decode(response.headers.get(HEADER, "{}"))
                piece.engines = tuple(trace[k] for k in ("prefill", "decode") if trace.get(k))
                text = await _read(piece, response) if stream else await response.read()
                status = response.status
        except (aiohttp.ClientError, TimeoutError) as error:
            piece.lost = repr(error)
            return
        piece.done_s = time.monotonic()
        _take(piece, status, text)


async def _read(piece: Piece, response: aiohttp.ClientResponse) -> bytes:
    """The last event of a stream; those before are noted."""
    text = b""
    async for line in response.content:
        if response.status != 200:
            text += line
        elif line.startswith(b"data: {"):
            text = line.removeprefix(b"data: ").strip()
            tokens = msgspec.json.decode(text).get("output_ids", ())
            piece.events.append((time.monotonic(), len(tokens)))
    return text


def _take(piece: Piece, status: int, text: bytes) -> None:
    """What the last, or only, JSON of an answer says."""
    try:
        value: dict[str, Any] = msgspec.json.decode(text)
    except msgspec.DecodeError:
        value = {}
    if status != 200 or "output_ids" not in value:
        piece.lost = f"{status} {text[:300].decode(errors='replace')}"
        return
    meta = value["meta_info"]
    piece.tokens, piece.reason = value["output_ids"], meta["finish_reason"]["type"]
    piece.cached_tokens = meta.get("cached_tokens", 0)
    whole = [{"version": meta.get("weight_version", BEFORE), "start": 0, "end": len(piece.tokens)}]
    piece.spans = msgspec.convert(meta.get("weight_versions") or whole, list[SglangSpan])
    if piece.reason != ABORTED and len(piece.tokens) != piece.wanted:
        piece.lost = f"{len(piece.tokens)} of {piece.wanted} tokens"
