"""How long each prefill forward takes, and the attention in it.

On a CPU attention is measured in the CPU time of the scheduler's thread, so that neither other
processes nor sleeping count; the forward is measured by the clock. What is spent waiting for KV
is no part of either. With streams (CUDA) both are measured by marks in the forward's stream, and
what is taken off is the time for which the device stood still meanwhile: from when it had done
all that it was given before the wait, until it was given the next.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, TypeVar

import msgspec

from engine.sglang.views import ForwardBatch
from engine.streams import Device, Mark

T = TypeVar("T")

DEVICE_BACKLOG = 2
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
    def mark_pause(self, mark: Mark) -> None: ...
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

    def mark_pause(self, mark: Mark) -> None:
        """The clock is told of waits by their sum."""

    def total_s(self) -> float:
        return self._sum_s


class _DeviceSpans:
    def __init__(self, device: Device) -> None:
        self._device = device
        self._marks: list[Mark] = []
        self._pauses: list[Mark] = []

    def mark(self) -> None:
        self._marks.append(self._device.mark(None, timed=True))

    def mark_pause(self, mark: Mark) -> None:
        """The begin or the end of one; what lies between two spans is none of theirs."""
        if len(self._marks) % 2:
            self._pauses.append(mark)

    def total_s(self) -> float:
        """Waits for the last mark."""
        if self._marks:
            self._marks[-1].synchronize()
        return (_between_ms(self._marks) - _between_ms(self._pauses)) / 1000


def _between_ms(marks: list[Mark]) -> float:
    pairs = zip(marks[::2], marks[1::2], strict=True)
    return sum(begin.elapsed_time(end) for begin, end in pairs)


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
        device: Device | None,
        waits: Callable[[], Waits],
        agree: Callable[[list[float]], list[float]],
        sink: Callable[[ForwardSample], None],
    ) -> None:
        self._device = device
        self._waits, self._agree = waits, agree
        self.sink = sink
        self._attention: _Spans | None = None
        self._running: list[_Spans] = []
        self._timed: deque[_Timed] = deque()

    def forward(self, run: Callable[[], T], forward_batch: ForwardBatch) -> T:
        """Run and time a forward; other ones than of prompts are only run."""
        mode = forward_batch.forward_mode
        if not mode.is_extend() or forward_batch.extend_seq_lens_cpu is None:
            return run()
        forward, attention = self._spans(self._wall_s), self._spans(self._cpu_s)
        self._attention, self._running = attention, [forward, attention]
        forward.mark()
        try:
            result = run()
        finally:
            self._attention, self._running = None, []
        forward.mark()
        new, context = forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu
        self._timed.append(_Timed(list(new), list(context), forward, attention))
        self.flush(DEVICE_BACKLOG if self._device is not None else 0)
        return result

    def flush(self, left: int = 0) -> None:
        """Hand over all forwards but the last ``left``; with streams, wait for them."""
        while len(self._timed) > left:
            self.sink(self._sample(self._timed.popleft()))

    @contextlib.contextmanager
    def handing_to(self, sink: Callable[[ForwardSample], None]) -> Iterator[None]:
        """The forwards meanwhile go to another sink: they are not what the engine is for."""
        usual, self.sink = self.sink, sink
        try:
            yield
            self.flush()
        finally:
            self.sink = usual

    def attention(self, run: Callable[[], T]) -> T:
        """Run and time the attention of one layer."""
        spans = self._attention
        if spans is None or (self._device is not None and self._device.is_capturing()):
            return run()
        self._attention = None  # a backend may hand over to another one: the outer call counts
        spans.mark()
        try:
            return run()
        finally:
            spans.mark()
            self._attention = spans

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """The thread of the forward waits for KV, and gives the device nothing."""
        self._mark_pause()
        yield
        self._mark_pause()

    def _mark_pause(self) -> None:
        if self._device is not None and self._running:
            mark = self._device.mark(None, timed=True)
            for spans in self._running:
                spans.mark_pause(mark)

    def _spans(self, now_s: Callable[[], float]) -> _Spans:
        return _DeviceSpans(self._device) if self._device is not None else _TimeSpans(now_s)

    def _wall_s(self) -> float:
        return time.monotonic() - self._waits().wall_s

    def _cpu_s(self) -> float:
        return time.thread_time() - self._waits().cpu_s

    def _sample(self, timed: _Timed) -> ForwardSample:
        forward_s, attention_s = self._agree([timed.forward.total_s(), timed.attention.total_s()])
        return ForwardSample(timed.new_tokens, timed.context_tokens, forward_s, attention_s)
