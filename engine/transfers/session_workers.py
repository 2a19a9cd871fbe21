"""One thread for each peer, so that a peer that hangs delays nobody else's transfers."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

IDLE_S = 60.0
"""A thread without work for so long ends; the next call starts another."""


class SessionWorkers:
    """Runs calls in the order of their submission, for each session (any string) by itself."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._queues: dict[str, queue.SimpleQueue[Callable[[], None]]] = {}

    def submit(self, session_id: str, call: Callable[[], None]) -> None:
        """Returns at once. ``call`` handles its own errors."""
        with self._lock:
            calls = self._queues.get(session_id)
            if calls is None:
                calls = self._queues[session_id] = queue.SimpleQueue()
                threading.Thread(
                    target=self._run,
                    args=(session_id, calls),
                    name=f"{self._name}-{session_id}",
                    daemon=True,
                ).start()
            calls.put(call)

    def _run(self, session_id: str, calls: queue.SimpleQueue[Callable[[], None]]) -> None:
        while True:
            try:
                call = calls.get(timeout=IDLE_S)
            except queue.Empty:
                with self._lock:
                    if calls.empty():
                        del self._queues[session_id]
                        return
                continue
            try:
                call()
            except Exception:  # a worker that dies would strand every later call
                log.exception("call failed session=%s", session_id)
