"""Prefill engine: forwards, followed from layer to layer.

SGLang launches a batch in one call, which calls us around each layer's attention, also where
it replays a breakable CUDA graph (``engine/sglang/prefill/forward_hooks.py``). Before it the
layer waits for its buffer and its prefix, where there is a layer window
(:mod:`engine.prefill.layer_window`); after it the layer's new KV leaves for the decode engines
(:mod:`engine.prefill.suffix_send`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial

import msgspec

from common.samples import Sample, sample
from engine.config import EngineConfig
from engine.kv_memory import KvMemory
from engine.page_table import PageTable
from engine.prefill.credit_writer import CreditWriter
from engine.prefill.layer_copies import LayerCopies
from engine.prefill.layer_ring import LayerRing
from engine.prefill.layer_window import LayerWindow, WindowForward
from engine.prefill.leaving import LeavingRequests
from engine.prefill.suffix_send import LayerSend, SuffixSender
from engine.ranks.group import CreditsAt
from engine.sglang.kv_pool import bytes_of
from engine.sglang.prefill.send_manager import SendManager
from engine.sglang.views import Batch, Scheduler
from engine.streams import Mark, Streams
from engine.transfers.deliveries import Deliveries
from engine.transfers.session_workers import SessionWorkers
from transfer.pacing.peer_nics import MovedBytes, PeerNics


class PrefillForward:
    """One forward. A layer is *done* when its attention has run: its KV is whole and is not
    read any more. Where a layer's attention runs in several calls (MLA), it is done when the
    next layer's begins."""

    def __init__(
        self,
        forwards: PrefillForwards,
        sends: dict[str, list[LayerSend]],
        window: WindowForward | None = None,
    ) -> None:
        self.window = window
        self._forwards = forwards
        # With a window a layer has to leave its buffer also where nothing goes anywhere.
        self._sends = sends if sends or window is None else {"": []}
        self._unsent = [len(self._sends)] * forwards.num_layers
        """Sessions that a layer has not left for yet."""
        self._lock = threading.Lock()
        self._next_layer = 0
        """The first that is not done yet."""
        self._waited = -1
        """The newest layer that has waited: both hooks around an attention may come."""

    def before_attention(self, layer: int) -> None:
        """May wait: for the layer's buffer and prefix, where there is a window."""
        self._done_until(layer)
        if self.window is not None and layer > self._waited:
            self._waited = layer
            self.window.before_layer(layer)

    def after_attention(self, layer: int) -> None:
        if self._forwards.one_call_a_layer:
            self._done_until(layer + 1)

    def finish(self) -> None:
        """The forward has been launched, a draft's behind it: whatever was not seen is done."""
        seen = self._next_layer + (not self._forwards.one_call_a_layer)
        self._forwards.unseen_layers_total += max(0, self._forwards.model_layers - seen)
        self._done_until(self._forwards.num_layers)

    def _done_until(self, layer: int) -> None:
        for done in range(self._next_layer, layer):
            written = self._forwards.streams.after_forwards()
            for session_id, sends in self._sends.items():
                call = partial(self._send, session_id, sends, done, written)
                self._forwards.workers.submit(session_id, call)
        self._next_layer = max(self._next_layer, layer)

    def _send(self, session_id: str, sends: list[LayerSend], layer: int, written: Mark) -> None:
        written.synchronize()
        self._forwards.suffix.send_layer(session_id, sends, layer)
        with self._lock:
            self._unsent[layer] -= 1
            has_left = not self._unsent[layer]
        if has_left and self.window is not None:
            self.window.layer_left(layer)


class Credits(msgspec.Struct, frozen=True):
    """Where this rank writes the credits of a layer window."""

    rank: int
    at: dict[str, CreditsAt]
    """By agent; filled in as agents say it."""


class PrefillForwards:
    """Builds the object that follows each forward. One per prefill engine."""

    def __init__(
        self,
        config: EngineConfig,
        scheduler: Scheduler,
        memory: KvMemory,
        deliveries: Deliveries,
        streams: Streams,
        credits: Credits,
    ) -> None:
        self.num_layers = memory.layout.num_layers
        self.model_layers = memory.layout.model_layers
        self.one_call_a_layer = not memory.has_latents
        self.workers = SessionWorkers("dualpath-suffix")
        manager = SendManager(scheduler.disagg_prefill_bootstrap_queue.kv_manager)
        self.copies = LayerCopies(manager, self.num_layers, memory.kv_layers)
        rows = scheduler.req_to_token_pool.req_to_token
        table = PageTable(rows, memory.layout.page_tokens, streams)
        sends_by_layer = config.experiment.send_by_layer or config.layer_window is not None
        self.suffix = SuffixSender(manager, self.copies, table, sends_by_layer)
        self.window: LayerWindow | None = None
        if config.layer_window is not None and config.layer_window < self.num_layers:
            ring = LayerRing(self.num_layers, config.layer_window)
            writer = CreditWriter(
                ring,
                credits.rank,
                credits.at,
                manager.engine,
                self.workers,
            )
            self.window = LayerWindow(ring, table, self.suffix, deliveries, writer, self.workers)
        self.leaving = LeavingRequests(scheduler)
        self.current: PrefillForward | None = None
        self._moved = MovedBytes(_nics_of(self.copies), "engine")
        self._deliveries = deliveries
        self._pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        self.streams = streams
        self.unseen_layers_total = 0

    def begin(self, batch: Batch) -> None:
        """A batch's forward starts."""
        sends = self.suffix.plan(batch.reqs)
        window = self.window.begin(batch.reqs) if self.window is not None else None
        self.current = PrefillForward(self, sends, window)

    def end(self) -> None:
        """It has been launched."""
        if self.current is not None:
            self.current.finish()
            self.current = None

    def samples(self) -> Iterator[Sample]:
        """For the metrics."""
        moved_bytes = self.copies.moved_bytes()
        sent_bytes = sum(n for (operation, _), n in moved_bytes.items() if operation == "write")
        read_back = self.window.read_back_pages_total if self.window is not None else 0
        for layer, seconds in enumerate(self._deliveries.waited_s):
            yield sample("engine_kv_wait_seconds_total", seconds, layer=str(layer))
        yield from self._moved.samples(moved_bytes)
        yield sample("engine_kv_bytes", bytes_of(self._pool))
        yield sample("engine_suffix_sent_bytes_total", sent_bytes)
        yield sample("engine_layers_unseen_total", self.unseen_layers_total)
        yield sample("engine_suffix_late_seconds_total", self.suffix.late_s_total)
        yield sample("engine_read_back_pages_total", read_back)


def _nics_of(copies: LayerCopies) -> PeerNics:
    """For the metrics. The launcher names the protocol where it is not RDMA."""
    is_rdma = os.environ.get("MOONCAKE_PROTOCOL", "rdma") == "rdma"
    return PeerNics(copies.is_local, is_rdma)
