"""Prefill engine: what happens around each layer of a forward.

SGLang computes a batch in one call; these hooks follow it from layer to layer. After a
layer's attention its new KV leaves for the decode engines (:mod:`engine.suffix_send`).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

import numpy as np
import torch

from engine.layer_ring import LayerRing
from engine.layer_window import CreditWriter, LayerWindow, WindowForward
from engine.leaving import LeavingRequests
from engine.runtime import EngineRuntime, runtime_if_up
from engine.session_workers import SessionWorkers
from engine.suffix_send import LayerSend, SendsDone, SuffixSender
from transfer.pacing import MovedBytes, NicBook

log = logging.getLogger(__name__)


class PrefillForward:
    """One forward. A layer is *done* when its attention has run: its KV is whole and is not
    read any more. Where a layer's attention runs in several calls (MLA), it is done when the
    next layer's begins."""

    def __init__(
        self,
        layers: PrefillLayers,
        sends: dict[str, list[LayerSend]],
        window: WindowForward | None = None,
    ) -> None:
        self.window = window
        self._layers = layers
        # With a window a layer has to leave its buffer also where nothing goes anywhere.
        self._sends = sends if sends or window is None else {"": []}
        self._unsent = [len(self._sends)] * layers.num_layers
        """Sessions that a layer has not left for yet."""
        self._lock = threading.Lock()
        self._next_layer = 0
        """The first that is not done yet."""

    def before_attention(self, layer: int) -> None:
        """May wait: for the layer's buffer and prefix, where there is a window."""
        self._done_until(layer)
        if self.window is not None:
            self.window.before_layer(layer)

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
        with self._lock:
            self._unsent[layer] -= 1
            has_left = not self._unsent[layer]
        if has_left and self.window is not None:
            self.window.layer_left(layer)


def _nics_of(suffix: SuffixSender) -> NicBook:
    """For the metrics. The launcher names the protocol where it is not RDMA."""
    is_rdma = os.environ.get("MOONCAKE_PROTOCOL", "rdma") == "rdma"
    return NicBook(suffix.is_local, is_rdma)


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
            engine.config.send_by_layer or engine.config.layer_window > 0,
        )
        self.moved = MovedBytes(_nics_of(self.suffix), "engine")
        self.window = self._open_window(engine)
        self.leaving = LeavingRequests(scheduler)
        self.current: PrefillForward | None = None
        self._is_cuda = str(pool.device).startswith("cuda")
        self._pool = pool
        self._deliveries = engine.deliveries

    def _open_window(self, engine: EngineRuntime) -> LayerWindow | None:
        if not 0 < engine.config.layer_window < self.num_layers:
            return None
        from sglang.srt.distributed.parallel_state import get_mooncake_transfer_engine

        ring = LayerRing(self.num_layers, engine.config.layer_window)
        transfer_engine = get_mooncake_transfer_engine()
        return LayerWindow(
            ring,
            engine.memory,
            engine.scheduler.req_to_token_pool.req_to_token,
            self.suffix,
            engine.deliveries,
            CreditWriter(
                ring,
                engine.ranks.rank,
                list(engine.config.agents),
                engine.credits_at,
                transfer_engine,
                self.workers,
            ),
            self.workers,
        )

    def begin(self, batch: Any) -> None:
        """A batch's forward starts."""
        sends = self.suffix.plan(batch.reqs)
        window = self.window.begin(batch.reqs) if self.window is not None else None
        self.current = PrefillForward(self, sends, window)

    def end(self) -> None:
        """It has been launched."""
        if self.current is not None:
            self.current.finish()
            self.current = None

    def counters(self) -> dict[str, float]:
        """For the metrics."""
        kv_bytes = np.sum(self._pool.get_kv_size_bytes())
        waited = {
            f'dualpath:engine_kv_wait_seconds_total{{layer="{layer}"}}': seconds
            for layer, seconds in enumerate(self._deliveries.waited_s)
        }
        return {
            **waited,
            **self.moved.samples(self.suffix.moved_bytes()),
            "dualpath:engine_kv_bytes": int(kv_bytes),
            "dualpath:engine_suffix_sent_bytes_total": self.suffix.sent_bytes_total,
            "dualpath:engine_suffix_late_seconds_total": self.suffix.late_s_total,
            "dualpath:engine_read_back_pages_total": (
                self.window.read_back_pages_total if self.window is not None else 0
            ),
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


def before_latent_write(pool: Any, layer: Any, *_: Any, **__: Any) -> None:
    """BEFORE ``MLATokenToKVPool.set_mla_kv_buffer``, which some of MLA's routes on CUDA call
    ahead of the attention. (Untested there.)"""
    layers = _layers()
    if layers is not None and layers.current is not None:
        layers.current.before_attention(layer.layer_id)


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


def before_add_request(queue: Any, req: Any, *_: Any, **__: Any) -> None:
    """BEFORE ``PrefillBootstrapQueue.add``."""
    layers = _layers()
    if layers is not None and layers.window is not None:
        req.skip_radix_cache_insert = True


def after_finish_loads(failed: list[Any], tree: Any, reqs: list[Any]) -> list[Any]:
    """AFTER ``UnifiedRadixCache.finish_external_linker_loads``, at the end of a forward: drop
    the requests whose prefix did not come. Ranks agree."""
    layers = _layers()
    forward = layers.current if layers is not None else None
    if forward is None or forward.window is None:
        return failed
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    reasons = forward.window.failed()
    whole = torch.tensor([req.rid not in reasons for req in reqs], dtype=torch.int)
    tree._all_reduce_attn_groups(whole, torch.distributed.ReduceOp.MIN)
    lost = [req for req, is_whole in zip(reqs, whole.tolist(), strict=True) if not is_whole]
    for req in lost:
        log.warning("prefix lost rid=%s reason=%r", req.rid, reasons.get(req.rid, "other rank"))
        req.discard_output_reason = FINISH_ABORT(
            "External KV cache load failed", HTTPStatus.SERVICE_UNAVAILABLE
        )
    forward.window.abandon()
    return failed + lost


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
    themselves has no pages left to send; its message to the decode engine waits for them.
    With a layer window others have nothing to send any more, so they fail."""
    layers = _layers()
    suffix = layers.suffix if layers is not None else None
    sends = suffix.claim(room, index_slice.stop, is_last_chunk) if suffix is not None else None
    if suffix is not None and sends is not None:
        kv_indices = kv_indices[:0]
        wait_event = SendsDone(partial(suffix.settle, room, sends))
    elif layers is not None and layers.window is not None and len(kv_indices):
        layers.suffix.refuse(room, "its KV could not leave layer by layer (unlike --tp?)")
        return None
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
