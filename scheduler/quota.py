"""Compute-quota chunking: every prefill batch gets the same estimated time.

The paper's rule (section on scheduling, "compute quota"): requests join a batch in FIFO order
until the quota is spent, and the last one's chunk is found by bisection, so that the ranks of
a data-parallel attention group finish their batches together. There is no leader here: each
rank packs its own queue to the same quota.

Pure: the engine packs with it (``engine/prefill/quota_chunking.py``), and so can a simulator.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import NamedTuple

from common.prefill_cost import PrefillCost, request_terms


class Chunk(NamedTuple):
    """A part of a request's prompt: ``new_tokens`` after ``context_tokens`` cached ones."""

    context_tokens: int
    new_tokens: int


class QuotaBatch:
    """One batch while it is packed.

    A chunk that is cut ends on a multiple of ``page_tokens``. A batch's first request gets
    one page even where that page alone costs more than the quota: a long request is never
    starved, and there is no empty batch while there is work.
    """

    def __init__(self, cost: PrefillCost, quota_s: float, page_tokens: int) -> None:
        self._coefficients = cost.coefficients()
        self._window_tokens = cost.window_tokens
        self._quota_s = quota_s
        self.page_tokens = page_tokens
        self.spent_s = float(self._coefficients[0])
        self.chunks: list[Chunk] = []
        self.closed = False
        """The quota is spent: nobody else joins, though somebody would."""

    def room(self, context_tokens: int, new_tokens: int) -> int:
        """How many of a request's next ``new_tokens`` may join: all, fewer, or none.

        Fewer are whole pages: context and chunk together end on one.
        """
        if self.closed:
            return 0
        left_s = self._quota_s - self.spent_s
        if self._chunk_s(context_tokens, new_tokens) <= left_s:
            return new_tokens
        page = self.page_tokens
        first = (context_tokens // page + 1) * page - context_tokens
        ends = range(first, new_tokens, page)
        fitting = bisect.bisect_right(
            ends, left_s, key=lambda tokens: self._chunk_s(context_tokens, tokens)
        )
        if fitting:
            return ends[fitting - 1]
        if not self.chunks:
            return min(first, new_tokens)
        self.closed = True
        return 0

    def add(self, chunk: Chunk, is_cut: bool) -> None:
        """The chunk joins. One that leaves tokens of its request for later closes the batch."""
        self.chunks.append(chunk)
        self.spent_s += self._chunk_s(*chunk)
        self.closed = is_cut or self.spent_s >= self._quota_s

    def _chunk_s(self, context_tokens: int, new_tokens: int) -> float:
        terms = request_terms(context_tokens, new_tokens, self._window_tokens)
        return float(self._coefficients[1:] @ terms)


def pack(waiting: Iterable[Chunk], batch: QuotaBatch, tokens_max: int) -> None:
    """Fill the batch from a queue: its chunk i is the beginning, or all, of request i.

    ``waiting``: what each request still lacks. ``tokens_max`` bounds the batch's new tokens
    whatever they cost (SGLang's ``--chunked-prefill-size``), counted in whole pages.
    """
    left, page = tokens_max, batch.page_tokens
    for context, new in waiting:
        tokens = batch.room(context, new)
        if tokens > left:
            tokens = (context + left) // page * page - context
        if tokens <= 0:
            break
        batch.add(Chunk(context, tokens), is_cut=tokens < new)
        left -= -(-tokens // page) * page
        if batch.closed:
            break
