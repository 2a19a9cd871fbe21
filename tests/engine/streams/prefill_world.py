"""A prefill engine's real parts on a made-up device, under SGLang's order of calls."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from common.block import BlockLayout
from engine.kv_memory import KvMemory
from engine.prefill.forward_clock import ForwardClock, ForwardSample
from engine.prefill.forwards import Credits, PrefillForwards
from engine.prefill.hit_loads import HitLoads
from engine.sglang.prefill import forward_hooks, timing_hooks
from engine.streams import Streams
from tests.engine.parts import Parts
from tests.engine.prefill.sends import LAYERS, PAGE, PAGE_BYTES, FakeManager
from tests.engine.streams.device import Device, Workers

ORDERS = ("eager", "graph")
"""SGLang runs the layers one by one, or replays a breakable CUDA graph; "unseen" is a replay that
calls no hook."""


class PrefillWorld(Parts):
    """``overlap``: forwards have a stream of their own. ``components``: K and V, or a latent."""

    def __init__(
        self,
        monkeypatch: Any,
        order: str = "eager",
        overlap: bool = True,
        components: int = 2,
        window: int | None = None,
    ) -> None:
        self.device = Device()
        self.overlap, self.order = overlap, order
        forward = self.device.forward if overlap else None
        super().__init__("prefill", streams=Streams(self.device, forward), layer_window=window)
        self.manager = FakeManager(components, window or LAYERS)
        self.workers = Workers()
        self.prefill_forwards = PrefillForwards(
            self.config,
            cast(Any, self._scheduler()),
            KvMemory(
                BlockLayout(PAGE, LAYERS, (PAGE_BYTES,) * components),
                [],
                "float32",
                has_latents=components == 1,
            ),
            self.deliveries,
            self.streams,
            Credits(0, {}),
        )
        if window is None:  # with one, a layer waits for what only these threads do
            self.deliveries.workers = cast(Any, self.workers)
            self.prefill_forwards.workers = cast(Any, self.workers)
        self.hit_loads = HitLoads(
            self.config, self.plans, self.deliveries, self.prefill_forwards.window
        )
        self.samples: list[ForwardSample] = []
        clock = ForwardClock(
            self.device, self.deliveries.waits, lambda seconds: seconds, self.samples.append
        )
        self.deliveries.pause = clock.pause
        self.prefill_timing = SimpleNamespace(clock=clock)
        self.inside: Callable[[int], None] = lambda layer: None
        """What a layer's attention waits for."""
        self.reads: Callable[[int], None] = lambda layer: None
        """What its kernel does first, when it runs."""
        self._random = np.random.default_rng(3)
        self.computed: dict[tuple[int, int], bytes] = {}
        """(layer, page) -> its KV, when the kernel has run that writes it."""
        for hooks in (forward_hooks, timing_hooks):
            monkeypatch.setattr(hooks, "runtime_if_up", lambda: self)

    def _scheduler(self) -> SimpleNamespace:
        return SimpleNamespace(
            disagg_prefill_bootstrap_queue=SimpleNamespace(kv_manager=self.manager),
            req_to_token_pool=SimpleNamespace(req_to_token=self.manager.req_to_token),
            token_to_kv_pool_allocator=SimpleNamespace(
                get_kvcache=lambda: SimpleNamespace(get_kv_size_bytes=lambda: 0)
            ),
        )

    # ---- SGLang's scheduler ----

    def run_batch(self, pages: list[int], *requests: Any) -> None:
        """Launch a forward that computes these pages, as ``Scheduler.run_batch`` does, between
        our hooks. Each page's KV is noise of its own."""
        batch = SimpleNamespace(
            forward_mode=SimpleNamespace(is_extend=lambda: True), reqs=list(requests)
        )
        forward_batch = SimpleNamespace(
            forward_mode=batch.forward_mode, extend_seq_lens_cpu=[1], extend_prefix_lens_cpu=[0]
        )
        forward_hooks.before_run_batch(None, batch)
        device = self.device
        if self.overlap:
            device.wait_stream(device.forward, device.schedule)
        with device.on(device.forward if self.overlap else device.schedule):
            timing_hooks.around_forward(
                lambda *_: self._layers(pages),
                SimpleNamespace(is_draft_worker=False),
                forward_batch,
            )
        forward_hooks.after_run_batch(None, None)

    def _layers(self, pages: list[int]) -> None:
        for layer in range(LAYERS):
            attention = SimpleNamespace(layer_id=layer)

            def backend(*_: Any, layer: int = layer, **__: Any) -> None:
                self.inside(layer)
                self.device.launch(lambda: self._write(layer, pages))

            def module(_: Any, backend: Any = backend, attention: Any = attention) -> None:
                forward_hooks.around_backend_attention(backend, None, 0, 0, 0, attention)

            if self.order == "eager":
                forward_hooks.around_layer_attention(module, attention)
            elif self.order == "graph":  # a break calls what the capture has kept: the body
                module(None)
            else:
                backend()
            self.device.launch(lambda: None)  # the rest of the layer

    def _write(self, layer: int, pages: list[int]) -> None:
        """Layer ``layer``'s attention: writes its KV."""
        self.reads(layer)
        for page in pages:
            for buffer in self.manager.own[layer::LAYERS]:
                noise = self._random.integers(0, 256, PAGE_BYTES, np.uint8)
                buffer.reshape(-1, PAGE_BYTES)[page] = noise
            self.computed[layer, page] = _page_of(self.manager.own, layer, page)

    def at_peer(self, layer: int, page: int) -> bytes:
        """The same at the decode engine."""
        return _page_of(self.manager.peer, layer, page)


def _page_of(pool: list[np.ndarray], layer: int, page: int) -> bytes:
    return b"".join(b.reshape(-1, PAGE_BYTES)[page].tobytes() for b in pool[layer::LAYERS])
