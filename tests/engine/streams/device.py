"""A device with streams, made up: what it is given runs as late as whoever waits for it allows.

So whatever relies on work that it did not wait for finds it undone, each time alike.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

import torch

from engine import streams
from engine.streams import Stream


class Queue:
    """A stream: work in order, each with the time that it takes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.work: deque[tuple[Callable[[], object], float, float]] = deque()
        self.now_ms = 0.0


class Mark:
    """A CUDA event."""

    def __init__(self, device: Device, queue: Queue) -> None:
        self._device = device
        self._queue = queue
        self.at_ms: float | None = None

    def query(self) -> bool:
        return self.at_ms is not None

    def synchronize(self) -> None:
        self._device.waited_in.append(threading.current_thread().name)
        self.run()
        assert self.at_ms is not None
        self._device.host_ms = max(self._device.host_ms, self.at_ms)

    def run(self) -> None:
        """Have the stream come to it."""
        with self._device.lock:
            while self.at_ms is None:
                self._device.step(self._queue)

    def elapsed_time(self, later: streams.Mark) -> float:
        assert isinstance(later, Mark)
        assert self.at_ms is not None and later.at_ms is not None, "not passed yet"
        return later.at_ms - self.at_ms

    def reached(self) -> None:
        self.at_ms = self._queue.now_ms


class Device:
    """``forward`` and ``schedule`` are the streams of SGLang's overlap loop. The host's clock
    moves when it is told to, and when something waits."""

    def __init__(self) -> None:
        self.forward, self.schedule = Queue("forward"), Queue("schedule")
        self.host_ms = 0.0
        self.waited_in: list[str] = []
        """Names of the threads that waited, in order."""
        self.lock = threading.RLock()
        self._current = self.schedule

    # ---- engine.streams.Device ----

    def mark(self, stream: Stream | None, timed: bool = False) -> Mark:
        queue = stream if isinstance(stream, Queue) else self._current
        mark = Mark(self, queue)
        self._put(queue, mark.reached)
        return mark

    def to_host(self, values: torch.Tensor) -> torch.Tensor:
        copy = torch.full_like(values, -1)
        self.launch(lambda: copy.copy_(values))
        return copy

    def within(self, stream: Stream | None) -> contextlib.AbstractContextManager[object]:
        return self.on(stream if isinstance(stream, Queue) else self._current)

    def is_capturing(self) -> bool:
        return False

    # ---- SGLang, and the kernels ----

    @contextlib.contextmanager
    def on(self, queue: Queue) -> Iterator[None]:
        """What is launched meanwhile goes into this stream."""
        before, self._current = self._current, queue
        try:
            yield
        finally:
            self._current = before

    def launch(self, kernel: Callable[[], object], ms: float = 1.0) -> None:
        self._put(self._current, kernel, ms)

    def wait_stream(self, queue: Queue, other: Queue) -> None:
        """Work of ``queue`` from now on comes after what ``other`` has been given."""
        mark = self.mark(other)

        def wait() -> None:
            mark.run()
            queue.now_ms = max(queue.now_ms, mark.at_ms or 0.0)

        self._put(queue, wait)

    def drain(self) -> None:
        """All of it runs."""
        for queue in (self.forward, self.schedule):
            while queue.work:
                self.step(queue)

    def step(self, queue: Queue) -> None:
        """One piece of work, not before the host has launched it."""
        with self.lock:
            call, ms, launched_ms = queue.work.popleft()
            queue.now_ms = max(queue.now_ms, launched_ms) + ms
            call()

    def _put(self, queue: Queue, call: Callable[[], object], ms: float = 0.0) -> None:
        with self.lock:
            queue.work.append((call, ms, self.host_ms))


class Workers:
    """Stands for the threads of :class:`engine.transfers.session_workers.SessionWorkers`: calls
    are made when the test says so, one after another."""

    def __init__(self) -> None:
        self.calls: deque[Callable[[], None]] = deque()

    def submit(self, session_id: str, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def run(self, calls: int = 1 << 30) -> None:
        while self.calls and calls:
            self.calls.popleft()()
            calls -= 1
