"""What plain SGLang gives, token for token."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import aiohttp
import msgspec

from benchmarks.clients.reference import TIE_MARGIN
from benchmarks.models.cluster import Answer, ask
from benchmarks.weights.cases import IN_PLACE, Case, is_changed
from benchmarks.weights.load import Piece
from benchmarks.weights.updates import Update

AT_ONCE = 4
"""Requests of one server; larger batches would be rounded otherwise."""


class Tokens(msgspec.Struct):
    """How many of an update's tokens are which."""

    right: int = 0
    wrong: int = 0
    """Also what comes behind a wrong one in the same span: it is not what was asked for."""
    ties: int = 0
    """Plain SGLang prefers another token by so little that batches of another size would not."""

    def add(self, other: Tokens) -> None:
        self.right += other.right
        self.wrong += other.wrong
        self.ties += other.ties


class Judged(msgspec.Struct):
    """The answers around one update."""

    before: Tokens = msgspec.field(default_factory=Tokens)
    after: Tokens = msgspec.field(default_factory=Tokens)
    """The commit."""
    went_on: int = 0
    """Tokens behind the commit of requests that were sent before it, where the mode says that they
    go on from KV of the weights before: plain SGLang with the new weights alone gives others."""
    others: int = 0
    """Answers sent after the commit that the weights before would have given otherwise."""


class Judge:
    """Asks two servers of plain SGLang, which never see an update."""

    def __init__(self, http: aiohttp.ClientSession, urls: Mapping[bool, str]) -> None:
        """``urls``: by whether the weights are the changed ones."""
        self._http, self._urls = http, urls
        self._at_once = {changed: asyncio.Semaphore(AT_ONCE) for changed in urls}
        self._asked: dict[tuple[bool, tuple[int, ...], int], asyncio.Task[Answer]] = {}

    async def judge(self, case: Case, update: Update, pieces: Sequence[Piece]) -> Judged:
        found = Judged()
        await asyncio.gather(*(self._piece(found, case, update, piece) for piece in pieces))
        later = [p for p in pieces if p.sent_s > update.committed_s and not p.lost]
        changed = not is_changed(update.version)
        checks = [self.compare(changed, p.prompt, p.tokens) for p in later]
        found.others = sum(tokens.wrong > 0 for tokens in await asyncio.gather(*checks))
        return found

    async def _piece(self, found: Judged, case: Case, update: Update, piece: Piece) -> None:
        is_later = piece.sent_s > update.committed_s
        for span in piece.spans:
            tokens = piece.tokens[span.start : span.end]
            is_new = span.version == update.version
            if is_new and not is_later and case.mode == IN_PLACE:
                found.went_on += len(tokens)
            elif is_later and not is_new:
                found.after.add(Tokens(wrong=len(tokens)))  # whatever they are
            else:
                prompt = piece.prompt + piece.tokens[: span.start]
                checked = await self.compare(is_changed(span.version), prompt, tokens)
                (found.after if is_new else found.before).add(checked)

    async def compare(self, changed: bool, prompt: list[int], tokens: list[int]) -> Tokens:
        """What these weights give behind the prompt, and what was given."""
        counted, begun = Tokens(), 0
        while begun < len(tokens):
            asked = len(tokens) - begun
            answer = await self._ask(changed, prompt + tokens[:begun], asked)
            given = zip(tokens[begun:], answer.tokens, strict=True)
            same = next((at for at, (ours, theirs) in enumerate(given) if ours != theirs), asked)
            counted.right += same
            begun += same
            if begun == len(tokens):
                break
            if answer.margins[same] >= TIE_MARGIN:
                counted.wrong += len(tokens) - begun
                break
            counted.ties += 1
            begun += 1
        return counted

    async def _ask(self, changed: bool, prompt: list[int], new_tokens: int) -> Answer:
        """Each is asked once."""
        known = changed, tuple(prompt), new_tokens
        if known not in self._asked:
            self._asked[known] = asyncio.create_task(self._really_ask(changed, prompt, new_tokens))
        return await self._asked[known]

    async def _really_ask(self, changed: bool, prompt: list[int], new_tokens: int) -> Answer:
        async with self._at_once[changed]:
            return await ask(self._http, self._urls[changed], prompt, new_tokens, margins=True)
