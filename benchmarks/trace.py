"""A request trace of block hashes becomes prompts, and says what a perfect cache would hit.

A trace line has ``timestamp`` (ms), ``input_length`` and ``output_length`` (tokens) and
``hash_ids``, one for each block of 512 prompt tokens; equal ids are equal prefixes.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections import defaultdict
from collections.abc import Hashable, Sequence
from fractions import Fraction
from pathlib import Path

import msgspec
import numpy as np

HASH_BLOCK_TOKENS = 512
PAGE_TOKENS = 64


class BadTrace(Exception):
    """A file that is not such a trace, or a scale that does not fit it."""


class TraceRequest(msgspec.Struct, frozen=True):
    """One line of the trace; ``line`` counts from 0."""

    line: int
    timestamp_ms: int
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]


class Turn(msgspec.Struct, frozen=True):
    """A request of the replay. ``session`` numbers the chosen sessions from 0."""

    session: int
    timestamp_s: float
    prompt: list[int]
    output_tokens: int


def load_trace(path: Path) -> list[TraceRequest]:
    """Every line, in file order; raises :class:`BadTrace` with the line that does not fit.

    A name that ends in ``.xz`` is that of a compressed file.
    """
    requests = []
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
    for number, line in enumerate(text.splitlines()):
        try:
            raw = json.loads(line)
            request = TraceRequest(
                number,
                raw["timestamp"],
                raw["input_length"],
                raw["output_length"],
                tuple(raw["hash_ids"]),
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise BadTrace(f"{path}:{number + 1}: not a request of a trace ({error!r})") from error
        if len(request.hash_ids) * HASH_BLOCK_TOKENS < request.input_tokens:
            raise BadTrace(f"{path}:{number + 1}: fewer hash_ids than input_length needs")
        requests.append(request)
    if not requests:
        raise BadTrace(f"{path} is empty")
    return requests


def sessions_of(requests: Sequence[TraceRequest]) -> list[list[TraceRequest]]:
    """Requests grouped by what they share, sessions in order of their first request.

    A session is all requests with the same first block of their own: the second block
    where all of the trace begins with one common block (a system prompt, as in Mooncake's
    conversation trace), the first where it does not. The trace has no user ids: requests
    that share that much are turns of one conversation or branches of it. A request of
    the common block alone is a session by itself.
    """
    common = 1 if len({r.hash_ids[:1] for r in requests}) == 1 else 0
    sessions: dict[Hashable, list[TraceRequest]] = defaultdict(list)
    for request in requests:
        own = request.hash_ids[common : common + 1]
        sessions[own or request.line].append(request)
    return list(sessions.values())


def choose_sessions(requests: Sequence[TraceRequest], count: int) -> list[list[TraceRequest]]:
    """The first ``count`` sessions of two turns or more; where the trace has too few, the
    first others as well. In order of their first requests."""
    sessions = sessions_of(requests)
    chosen = [s for s in sessions if len(s) > 1][:count]
    chosen += [s for s in sessions if len(s) == 1][: count - len(chosen)]
    return sorted(chosen, key=lambda s: s[0].line)


class PromptMaker(msgspec.Struct, frozen=True):
    """Hash blocks to tokens: the same id always gives the same, different ids different ones.

    ``scale`` shrinks every length alike. Tokens are drawn from [token_first, token_last):
    ordinary words of any vocabulary, with no special token among them.
    """

    scale: Fraction
    token_first: int = 300
    token_last: int = 2000

    @property
    def block_tokens(self) -> int:
        """Tokens of one hash block; raises :class:`BadTrace` unless that is whole and positive."""
        tokens = HASH_BLOCK_TOKENS * self.scale
        if tokens.denominator != 1 or tokens < 1:
            raise BadTrace(f"scale {self.scale} makes no whole block of {HASH_BLOCK_TOKENS} tokens")
        return int(tokens)

    def prompt(self, request: TraceRequest) -> list[int]:
        tokens = self._scaled(request.input_tokens)
        needed = -(-tokens // self.block_tokens)
        return [t for h in request.hash_ids[:needed] for t in self._block(h)][:tokens]

    def turns(self, sessions: Sequence[Sequence[TraceRequest]]) -> list[Turn]:
        """All requests of the sessions in trace order."""
        numbered = [(r, number) for number, session in enumerate(sessions) for r in session]
        return [
            Turn(
                session=number,
                timestamp_s=request.timestamp_ms / 1000,
                prompt=self.prompt(request),
                output_tokens=self._scaled(request.output_tokens),
            )
            for request, number in sorted(numbered, key=lambda pair: pair[0].line)
        ]

    def _scaled(self, tokens: int) -> int:
        return max(1, -(-(tokens * self.scale).numerator // (tokens * self.scale).denominator))

    def _block(self, hash_id: int) -> list[int]:
        generator = np.random.default_rng([0xD0A1, hash_id])
        return generator.integers(self.token_first, self.token_last, self.block_tokens).tolist()


class SeenBlocks:
    """What the trace implies: the pages that earlier completed requests computed."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def hit_blocks(self, prompt: Sequence[int]) -> int:
        """Leading pages of ``prompt`` seen before, at most floor((n - 1) / 64)."""
        pages = _page_chain(prompt[: len(prompt) - 1])
        return next((i for i, page in enumerate(pages) if page not in self._seen), len(pages))

    def completed(self, prompt: Sequence[int], generated: Sequence[int]) -> None:
        """A request is over. KV exists of all its tokens but the last generated one."""
        self._seen.update(_page_chain([*prompt, *generated][:-1]))


def possible_blocks(prompt_tokens: int) -> int:
    """Pages that could be a hit: the last token is always computed."""
    return (prompt_tokens - 1) // PAGE_TOKENS


def _page_chain(tokens: Sequence[int]) -> list[bytes]:
    """One digest for each full page, over it and all before it."""
    ids = np.asarray(tokens, dtype=np.int64)
    chain, digest = [], hashlib.sha256()
    for end in range(PAGE_TOKENS, len(ids) + 1, PAGE_TOKENS):
        digest.update(ids[end - PAGE_TOKENS : end].tobytes())
        chain.append(digest.digest())
    return chain
