"""Clients that converse, and what became of each of their requests."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import msgspec

from benchmarks.clients.reference import FIRST, Conversation, sampling
from launch.gateway.request.trace import HEADER

CLIENTS = 4
SALTS = 3
"""Under which each conversation is held, so often that most of it is stored already."""
ANSWER_TIMEOUT_S = 60.0
AGAIN_S = 0.5
"""After a connection that broke; the gateway may be starting."""
RETRY_AFTER_MAX_S = 5.0

REFUSED_CONNECTION = "ConnectionRefusedError"
RIGHT, WRONG, TIE = "right", "wrong", "tie"
ERROR, REFUSED, BROKEN, SILENT = "error", "refused", "broken", "silent"


class Answer(msgspec.Struct):
    """One request of a client. Times are the monotonic clock's."""

    conversation: int
    turn: int
    salt: str
    stream: bool
    sent_s: float
    done_s: float = 0.0
    outcome: str = SILENT
    """RIGHT, WRONG, TIE (nobody knows), ERROR (5xx, or one in the stream), REFUSED (4xx), BROKEN
    (the connection, in mid-answer), SILENT (nothing in ANSWER_TIMEOUT_S)."""
    says: str = ""
    """Of an answer that is no tokens."""
    tokens: list[int] = []
    version: str = ""
    """Of the weights, as the answer says."""
    trace: dict[str, Any] = {}


class Weights:
    """Which versions an answer may be of, over time."""

    def __init__(self) -> None:
        self._changes: list[tuple[float, frozenset[str]]] = [(0.0, frozenset([FIRST]))]

    def allow(self, *versions: str) -> None:
        """From now on."""
        self._changes.append((time.monotonic(), frozenset(versions)))

    def allowed(self, since_s: float, until_s: float) -> frozenset[str]:
        """At any time between."""
        found: frozenset[str] = frozenset()
        ends = [begun_s for begun_s, _ in self._changes[1:]] + [float("inf")]
        for (begun_s, versions), end_s in zip(self._changes, ends, strict=True):
            if begun_s <= until_s and end_s >= since_s:
                found |= versions
        return found


class Load:
    """``run`` until ``stop``; ``answers`` grows."""

    def __init__(
        self,
        urls: Sequence[str],
        conversations: Sequence[Conversation],
        weights: Weights,
        on_answer: Callable[[Answer], None],
        salts: int = SALTS,
    ) -> None:
        """``urls``: of gateways; where one breaks, the next is asked from then on."""
        self.salts = [f"salt-{number}" for number in range(salts)]
        self.answers: list[Answer] = []
        self._urls = list(urls)
        self._conversations = conversations
        self._weights = weights
        self._on_answer = on_answer
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Requests that are under way are waited for."""
        self._stopping.set()

    async def run(self, seed: int) -> None:
        async with self._session() as http:
            clients = [random.Random(f"{seed} {number}") for number in range(CLIENTS)]
            await asyncio.gather(*(self._converse(http, rng) for rng in clients))

    async def ask_all(self, salts: Sequence[str]) -> list[Answer]:
        """Each conversation's last turn under each salt, one after the other."""
        found = []
        async with self._session() as http:
            for salt in salts:
                for number, conversation in enumerate(self._conversations):
                    asked = Answer(number, len(conversation) - 1, salt, False, time.monotonic())
                    found.append(await self._ask_until_answered(http, asked))
        return found

    def _session(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
        return aiohttp.ClientSession(timeout=timeout, read_bufsize=1 << 20)

    async def _converse(self, http: aiohttp.ClientSession, rng: random.Random) -> None:
        while not self._stopping.is_set():
            number = rng.randrange(len(self._conversations))
            salt = rng.choice(self.salts)
            for turn in range(len(self._conversations[number])):
                begun = Answer(number, turn, salt, rng.random() < 0.5, time.monotonic())
                answer = await self._ask_until_answered(http, begun)
                if self._stopping.is_set() or answer.outcome not in (RIGHT, TIE):
                    break

    async def _ask_until_answered(self, http: aiohttp.ClientSession, begun: Answer) -> Answer:
        """A client sends again what its connection lost, until there is an answer."""
        deadline = begun.sent_s + ANSWER_TIMEOUT_S
        while (answer := await self._ask(http, begun)).outcome == BROKEN:
            if time.monotonic() > deadline:
                break
            if REFUSED_CONNECTION not in answer.says:
                self._keep(answer)  # what was under way is lost
            await asyncio.sleep(AGAIN_S)
            begun = msgspec.structs.replace(begun, sent_s=time.monotonic())
        if answer.outcome == BROKEN:
            answer.outcome = SILENT
        self._keep(answer)
        return answer

    def _keep(self, answer: Answer) -> None:
        self.answers.append(answer)
        self._on_answer(answer)

    async def _ask(self, http: aiohttp.ClientSession, begun: Answer) -> Answer:
        answer = msgspec.structs.replace(begun)
        turn = self._conversations[answer.conversation][answer.turn]
        body = {
            "input_ids": turn.prompt,
            "sampling_params": sampling(turn.new_tokens),
            "cache_salt": answer.salt,
            "stream": answer.stream,
        }
        pause_s, url = 0.0, self._urls[0]
        try:
            async with http.post(f"{url}/generate", json=body) as response:
                answer.trace = msgspec.json.decode(response.headers.get(HEADER, "{}"))
                text = await response.read()
                self._judge(answer, response.status, text)
                if answer.outcome in (ERROR, REFUSED):
                    pause_s = min(float(response.headers.get("Retry-After", 1)), RETRY_AFTER_MAX_S)
        except TimeoutError:
            answer.outcome = SILENT
        except aiohttp.ClientError as error:
            answer.outcome, answer.says = BROKEN, repr(error)
            if url == self._urls[0]:
                self._urls = [*self._urls[1:], url]
        answer.done_s = time.monotonic()
        self._compare(answer)
        await asyncio.sleep(pause_s)
        return answer

    def _judge(self, answer: Answer, status: int, text: bytes) -> None:
        """Outcome and tokens, not yet compared."""
        last = last_event(text) if answer.stream and status == 200 else text
        try:
            value = msgspec.json.decode(last)
        except msgspec.DecodeError:
            value = {}
        if status != 200 or "output_ids" not in value:
            answer.outcome = REFUSED if 400 <= status < 500 else ERROR
            answer.says = f"{status} {last[:400].decode(errors='replace')}"
            return
        answer.outcome = TIE
        answer.tokens = value["output_ids"]
        answer.version = value["meta_info"].get("weight_version", FIRST)

    def _compare(self, answer: Answer) -> None:
        if answer.outcome != TIE:
            return
        if answer.version not in self._weights.allowed(answer.sent_s, answer.done_s):
            answer.outcome, answer.says = WRONG, f"of the weights {answer.version}"
            return
        right = self._conversations[answer.conversation][answer.turn].right.get(answer.version)
        if right is not None:
            answer.outcome = RIGHT if answer.tokens == right else WRONG


def last_event(stream: bytes) -> bytes:
    """JSON of the last event before ``[DONE]``."""
    events = [event for event in stream.split(b"\n\n") if event.startswith(b"data: ")]
    events = [event for event in events if event != b"data: [DONE]"]
    return events[-1].removeprefix(b"data: ") if events else b""
