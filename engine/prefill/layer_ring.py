"""The layer window: a KV pool whose buffers serve several layers in turn.

The pool has buffers for W layers; layer ``l`` uses buffer ``l % W``. Layers of all forwards
are numbered through: *position* ``p = forward * L + layer``. A position may be filled when
the one that had its buffer before is finished: its attention has run, and its new KV has
left. Paper: layer-wise ("hierarchical") prefill.
"""

from __future__ import annotations

import threading
import time

WAIT_MAX_S = 120.0
"""A buffer that is not free by then never will be: every send and delivery ends sooner."""


class RingStuck(Exception):
    """A bug: a position was not finished although everything that it waits for has ended."""


class LayerRing:
    """Which positions may be filled. Thread-safe."""

    def __init__(self, num_layers: int, window: int) -> None:
        self.num_layers = num_layers
        self.window = window
        self.free_until = window
        """Every position before this one may be filled: the credits of all writers."""
        self._finished: set[int] = set()
        self._condition = threading.Condition()

    def previous_user(self, position: int) -> int:
        """The position that had this one's buffer before it; negative for the first."""
        forward, layer = divmod(position, self.num_layers)
        if layer >= self.window:
            return position - self.window
        last = layer + (self.num_layers - 1 - layer) // self.window * self.window
        return (forward - 1) * self.num_layers + last

    def finish(self, position: int) -> None:
        """The buffer of this position is free again."""
        with self._condition:
            self._finished.add(position)
            while (before := self.previous_user(self.free_until)) in self._finished:
                self._finished.discard(before)
                self.free_until += 1
            self._condition.notify_all()

    def wait_free(self, position: int, timeout_s: float = WAIT_MAX_S) -> None:
        """Until a position may be filled; raises :class:`RingStuck`."""
        deadline_s = time.monotonic() + timeout_s
        with self._condition:
            while self.free_until <= position:
                if not self._condition.wait(max(0.0, deadline_s - time.monotonic())):
                    raise RingStuck(f"position {position} is not free after {timeout_s} s")
