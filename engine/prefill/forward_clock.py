"""How long each prefill forward takes, and the attention in it.

On a CPU attention is measured in the CPU time of the scheduler's thread, so that neither other
processes nor sleeping count; the forward is measured by the clock. What is spent waiting for KV
is no part of either. On CUDA both are measured by events on the forward's stream (untested: no such
machine was at hand).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import msgspec
import torch

from engine.sglang.views import ForwardBatch

T = TypeVar("T")

CUDA_BACKLOG = 2
"""Forwards that SGLang's overlap loop keeps in flight: an older one has ended."""


class ForwardSample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One forward: of each of its requests the new tokens and the cached ones before them."""

    new_tokens: list[int]
    context_tokens: list[int]
    forward_s: float
    attention_s: float
    """0 where attention ran out of sight, inside a captured graph."""


class Waits(NamedTuple):
    """What forwards have spent waiting for KV so far, by the clock and in CPU time of their
    thread, which polls: neither is the engine's speed."""

    wall_s: float = 0.0
    cpu_s: float = 0.0


class _Spans(Protocol):
    """Adds up the time between pairs of marks."""

    def mark(self) -> None: ...
    def total_s(self) -> float: ...


class _TimeSpans:
    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._sum_s = 0.0
        self._begun_s: float | None = None

    def mark(self) -> None:
        if self._begun_s is None:
            self._begun_s = self._now_s()
        else:
            self._sum_s += self._now_s() - self._begun_s
            self._begun_s = None

    def total_s(self) -> float:
        return self._sum_s


class _CudaSpans:
    def __init__(self, waits: Callable[[], Waits]) -> None:
        self._waits = waits
        self._events: list[torch.cuda.Event] = []
        self._waited_s: list[float] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)
        self._waited_s.append(self._waits().wall_s)

    def total_s(self) -> float:
        """Waits for the last mark."""
        if self._events:
            self._events[-1].synchronize()
        pairs = zip(self._events[::2], self._events[1::2], strict=True)
        elapsed_s = sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
        # The stream stands still while the host waits for KV before it launches a layer.
        waited_s = sum(self._waited_s[1::2]) - sum(self._waited_s[::2])
        return max(0.0, elapsed_s - waited_s)


class _Timed(NamedTuple):
    new_tokens: list[int]
    context_tokens: list[int]
    forward: _Spans
    attention: _Spans


class ForwardClock:
    """Times the forwards of this process and hands each to ``sink``.

    ``waits`` says what forwards have spent waiting for KV so far. ``agree`` makes one number
    of each rank's, in every rank: SGLang's ranks decide alike without asking each other, so
    what they decide by must be alike too.
    """

    def __init__(
        self,
        device: str,
        waits: Callable[[], Waits],
        agree: Callable[[list[float]], list[float]],
        sink: Callable[[ForwardSample], None],
    ) -> None:
        self._on_cuda = device == "cuda"
        self._waits, self._agree = waits, agree
        self.sink = sink
        self._attention: _Spans | None = None
        self._timed: deque[_Timed] = deque()

    def forward(self, run: Callable[[], T], forward_batch: ForwardBatch) -> T:
        """Run and time a forward; other ones than of prompts are only run."""
        mode = forward_batch.forward_mode
        if not mode.is_extend() or forward_batch.extend_seq_lens_cpu is None:
            return run()
        forward, attention = self._spans(self._wall_s), self._spans(self._cpu_s)
        self._attention = attention
        forward.mark()
        try:
            result = run()
        finally:
            self._attention = None
        forward.mark()
        new, context = forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu
        self._timed.append(_Timed(list(new), list(context), forward, attention))
        self.flush(CUDA_BACKLOG if self._on_cuda else 0)
        return result

    def flush(self, left: int = 0) -> None:
        """Hand over all forwards but the last ``left``; on CUDA, wait for them."""
        while len(self._timed) > left:
            self.sink(self._sample(self._timed.popleft()))

    def attention(self, run: Callable[[], T]) -> T:
        """Run and time the attention of one layer."""
        spans = self._attention
        if spans is None or (self._on_cuda and torch.cuda.is_current_stream_capturing()):
            return run()
        self._attention = None  # a backend may hand over to another one: the outer call counts
        spans.mark()
        try:
            return run()
        finally:
            spans.mark()
            self._attention = spans

    def _spans(self, now_s: Callable[[], float]) -> _Spans:
        return _CudaSpans(self._waits) if self._on_cuda else _TimeSpans(now_s)

    def _wall_s(self) -> float:
        return time.monotonic() - self._waits().wall_s

    def _cpu_s(self) -> float:
        return time.thread_time() - self._waits().cpu_s

    def _sample(self, timed: _Timed) -> ForwardSample:
        forward_s, attention_s = self._agree([timed.forward.total_s(), timed.attention.total_s()])
        return ForwardSample(timed.new_tokens, timed.context_tokens, forward_s, attention_s)
