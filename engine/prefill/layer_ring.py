"""The layer window: a KV pool whose buffers serve several layers in turn.

The pool has buffers for W layers; layer ``l`` uses buffer ``l % W``. Layers of all forwards
are numbered through: *position* ``p = forward * L + layer``. A position may be filled when
the one that had its buffer before is finished: its attention has run, and its new KV has
left. Paper: layer-wise ("hierarchical") prefill.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

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


# ---- the pool (hooks) -------------------------------------------------------------------


def around_create_buffers(original: Callable[[Any], None], pool: Any) -> None:
    """AROUND ``MHATokenToKVPool._create_buffers_normal`` and
    ``MLATokenToKVPool._create_buffers``: W buffers instead of L, each known by the names of
    all its layers. SGLang registers equal regions once (mooncake/conn.py)."""
    window, layers = _window_of(pool.layer_num), pool.layer_num
    if not window:
        original(pool)
        return
    pool.layer_num = window
    try:
        original(pool)
    finally:
        pool.layer_num = layers
    for name in ("k_buffer", "v_buffer", "kv_buffer"):
        buffers = getattr(pool, name, None)
        if buffers:
            setattr(pool, name, [buffers[layer % window] for layer in range(layers)])


def after_kv_size(result: Any, pool: Any) -> Any:
    """AFTER ``get_kv_size_bytes``, which counts every name of a buffer."""
    window, layers = _window_of(pool.layer_num), pool.layer_num
    if not window:
        return result
    if isinstance(result, tuple):
        return tuple(size * window // layers for size in result)
    return result * window // layers


def after_cell_size(result: int, configurator: Any, kvc: Any, num_layers: int) -> int:
    """AFTER ``_compute_cell_size``: bytes that a token takes, from which SGLang sizes the
    pool for the device's memory."""
    window = _window_of(num_layers)
    return -(-result * window // num_layers) if window else result


def around_fused_write(original: Callable[[Any], bool], forward_batch: Any) -> bool:
    """AROUND ``enable_fused_set_kv_buffer``: a kernel that writes KV along with the rotary
    embedding does so before the attention, hence before we know that the buffer is free.
    (Untested: such kernels are CUDA's.)"""
    return original(forward_batch) and not _layer_window()


def _window_of(num_layers: int) -> int:
    """W, or 0 where every layer has a buffer of its own."""
    window = _layer_window()
    return window if window < num_layers else 0


@cache
def _layer_window() -> int:
    from engine.config import EngineConfig

    return EngineConfig.from_env().layer_window or 0
