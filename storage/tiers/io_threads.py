"""Threads that do a tier's blocking calls."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

Work = Callable[[], None]

CLOSE_TIMEOUT_S = 3.0
"""For the calls that run when a tier closes."""

SWITCH_INTERVAL_S = 5e-4
"""For ``sys.setswitchinterval`` in a process with such threads: with Python's 5 ms, an I/O
thread that comes back from a call waits so long for each busy Python thread."""


class IoThreads:
    """A fixed set of daemon threads over one queue; its owner bounds what it submits.

    Daemon threads, unlike those of ``concurrent.futures``, let a process exit while a
    call to a dead disk or server hangs.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Work) -> None:
        """Run ``work`` (which must not raise) in one of the threads."""
        self._queue.put(work)

    def close(self, timeout_s: float) -> bool:
        """Drop queued work, and wait up to ``timeout_s`` for the running calls to end."""
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        for _ in self._threads:
            self._queue.put(None)
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            work()
