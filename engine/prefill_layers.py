"""Prefill engine: what happens around each layer of a forward.

SGLang computes a batch in one call; these hooks follow it from layer to layer. After a
layer's attention its new KV leaves for the decode engines (:mod:`engine.suffix_send`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from engine.runtime import EngineRuntime, runtime_if_up
from engine.session_workers import SessionWorkers
from engine.suffix_send import LayerSend, SendsDone, SuffixSender


class PrefillForward:
    """One forward. A layer is *done* when its attention has run: its KV is whole and is not
    read any more. Where a layer's attention runs in several calls (MLA), it is done when the
    next layer's begins."""

    def __init__(self, layers: PrefillLayers, sends: dict[str, list[LayerSend]]) -> None:
        self._layers = layers
        self._sends = sends
        self._next_layer = 0
        """The first that is not done yet."""

    def before_attention(self, layer: int) -> None:
        self._done_until(layer)

    def after_attention(self, layer: int) -> None:
        if self._layers.one_call_a_layer:
            self._done_until(layer + 1)

    def finish(self) -> None:
        """The forward has been launched: whatever was not seen is done (CUDA graphs call no
        hook)."""
        self._done_until(self._layers.num_layers)

    def _done_until(self, layer: int) -> None:
        for done in range(self._next_layer, layer):
            written = self._layers.mark()
            for session_id, sends in self._sends.items():
                call = partial(self._send, session_id, sends, done, written)
                self._layers.workers.submit(session_id, call)
        self._next_layer = max(self._next_layer, layer)

    def _send(
        self, session_id: str, sends: list[LayerSend], layer: int, written: Callable[[], None]
    ) -> None:
        written()
        self._layers.suffix.send_layer(session_id, sends, layer)


class PrefillLayers:
    """Builds the object that follows each forward. One per prefill engine."""

    def __init__(self, engine: EngineRuntime) -> None:
        scheduler = engine.scheduler
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        self.num_layers = engine.memory.layout.num_layers
        self.one_call_a_layer = len(engine.memory.layout.component_bytes) == 2
        self.workers = SessionWorkers("dualpath-suffix")
        self.suffix = SuffixSender(
            scheduler.disagg_prefill_bootstrap_queue.kv_manager,
            engine.memory.layout.page_tokens,
            self.num_layers,
            scheduler.req_to_token_pool.req_to_token,
        )
        self.current: PrefillForward | None = None
        self._is_cuda = str(pool.device).startswith("cuda")

    def begin(self, batch: Any) -> None:
        """A batch's forward starts."""
        self.current = PrefillForward(self, self.suffix.plan(batch.reqs))

    def end(self) -> None:
        """It has been launched."""
        if self.current is not None:
            self.current.finish()
            self.current = None

    def counters(self) -> dict[str, float]:
        """For the metrics."""
        return {
            "dualpath:engine_suffix_sent_bytes_total": self.suffix.sent_bytes_total,
            "dualpath:engine_suffix_late_seconds_total": self.suffix.late_s_total,
        }

    def mark(self) -> Callable[[], None]:
        """Waits, in another thread, until the device has done what it was given so far."""
        if not self._is_cuda:
            return _already
        event = torch.cuda.Event()  # untested: no such machine was at hand
        event.record()
        return event.synchronize


def _already() -> None:
    """A CPU has done its work when the call returns."""


def _layers() -> PrefillLayers | None:
    engine = runtime_if_up()
    return engine.prefill_layers if engine is not None else None


# ---- hooks ------------------------------------------------------------------------------


def before_run_batch(scheduler: Any, batch: Any, *_: Any, **__: Any) -> None:
    """BEFORE ``Scheduler.run_batch``."""
    layers = _layers()
    if layers is not None and batch.forward_mode.is_extend():
        layers.begin(batch)


def after_run_batch(result: Any, scheduler: Any, *_: Any, **__: Any) -> None:
    """AFTER ``Scheduler.run_batch``."""
    layers = _layers()
    if layers is not None:
        layers.end()


def around_attention(original: Any, attention: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``RadixAttention.forward``."""
    layers = _layers()
    forward = layers.current if layers is not None else None
    if forward is None:
        return original(attention, *args, **kwargs)
    forward.before_attention(attention.layer_id)
    result = original(attention, *args, **kwargs)
    forward.after_attention(attention.layer_id)
    return result


def around_add_transfer(
    original: Any,
    manager: Any,
    room: int,
    kv_indices: Any,
    index_slice: slice,
    is_last_chunk: bool,
    *args: Any,
    wait_event: Any = None,
    **kwargs: Any,
) -> Any:
    """AROUND ``MooncakeKVManager.add_transfer_request``: a chunk whose layers went out by
    themselves has no pages left to send; its message to the decode engine waits for them."""
    layers = _layers()
    suffix = layers.suffix if layers is not None else None
    sends = suffix.claim(room, index_slice.stop, is_last_chunk) if suffix is not None else None
    if suffix is not None and sends is not None:
        kv_indices = kv_indices[:0]
        wait_event = SendsDone(partial(suffix.settle, room, sends))
    return original(
        manager,
        room,
        kv_indices,
        index_slice,
        is_last_chunk,
        *args,
        wait_event=wait_event,
        **kwargs,
    )


def around_drained_abort(original: Any, manager: Any, room: int) -> None:
    """AROUND ``MooncakeKVManager._maybe_ack_drained_abort``: not while our writes are in
    flight; the last of them asks again."""
    layers = _layers()
    if layers is None or not layers.suffix.is_in_flight(room):
        original(manager, room)
