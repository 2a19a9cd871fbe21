"""Prefill engine: SGLang's external-cache linker, fed by agents.

SGLang asks a linker for a request's restorable prefix, hands it device pages, and lets
each layer's attention wait for that layer (sglang/srt/mem_cache/unified_cache/
unified_cache_linker.py). Here the answer comes from the plan that the gateway announced,
the bytes come by one-sided writes from the plan's readers, and the wait reads the
completion board. The gateway sends a request only when its blocks are in DRAM, so a
forward waits for delivery, never for storage.

A request whose delivery failed is dropped alone (its batch-mates are unaffected), and the
gateway sends it again without a plan: its blocks are recomputed.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from engine.plans import HeldPlan
from engine.runtime import EngineRuntime, runtime
from engine.transfers.deliveries import Delivery

log = logging.getLogger(__name__)


class LayerGate:
    """What the KV pool asks before each layer's attention. A *consumer index* names the
    deliveries that one batch waits for; -1 is a batch that loads nothing."""

    def __init__(self) -> None:
        self._of_index: dict[int, list[Delivery]] = {}
        self._next_index = 0
        self._consumer = -1

    def add(self, deliveries: list[Delivery]) -> int:
        """Index for a batch about to run."""
        index, self._next_index = self._next_index, self._next_index + 1
        self._of_index[index] = deliveries
        return index

    def set_consumer(self, index: int) -> None:
        """The batch whose forward runs next."""
        self._consumer = index

    def wait_until(self, layer: int) -> None:
        """Block the forward until the layer is ready for every request of the batch, or
        its delivery has failed; each delivery has its own timeout."""
        engine = runtime()
        if not engine.config.experiment.load_by_layer:
            layer = engine.memory.layout.num_layers - 1
        for delivery in self._of_index.get(self._consumer, ()):
            engine.deliveries.wait_layer(delivery, layer)

    def take(self, index: int) -> list[Delivery]:
        """The deliveries of a batch whose forward has run."""
        return self._of_index.pop(index, [])

    def reset(self) -> None:
        """After a flush nothing may wait for earlier deliveries."""
        self._of_index.clear()
        self._consumer = -1


class PrefillLinker(UnifiedCacheLinker):
    """One per scheduler process, built by SGLang before the runtime is ready."""

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: set[Any],
        extra_config: dict[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:
        self.pools = {PoolName.KV: params.token_to_kv_pool_allocator.get_kvcache()}
        self.layer_done_counter = LayerGate()
        self.forward_stream = forward_stream
        self._page_tokens = params.page_size
        self._found: dict[str, tuple[HeldPlan, int]] = {}
        self._queued: dict[str, tuple[HeldPlan, int, list[int]]] = {}
        self._failed: set[str] = set()

    # ---- the scheduler's thread ----

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Restorable prefix lengths, in pages, of the tail that the device lacks."""
        plan = runtime().plans.get(rid)
        if plan is None:
            return []
        wanted = runtime().keys_of(bytes.fromhex(key) for key in _keys(transfers))
        first = next((i for i, key in enumerate(plan.keys) if key == wanted[0]), None)
        if first is None:
            return []  # the device already has all that the plan offers
        pages = 0
        for key, planned in zip(wanted, plan.keys[first:], strict=False):
            if key != planned:
                break
            pages += 1
        self._found[rid] = (plan, first)
        window = runtime().layer_window
        if window is not None:
            window.note_hit(plan, pages)
        return list(range(1, pages + 1))

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Queue the delivery of the found pages into the device pages given. With a layer
        window it is the forward that has them delivered."""
        plan, first = self._found.pop(rid)
        if runtime().layer_window is not None:
            return True
        rows = next(t for t in transfers if t.name == PoolName.KV).device_indices
        pages = (rows.reshape(-1, self._page_tokens)[:, 0] // self._page_tokens).tolist()
        self._queued[rid] = (plan, first, pages)
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        """Drop a load that has not started."""
        self._found.pop(rid, None)
        return self._queued.pop(rid, None) is not None

    def start_layer_wise_loading(self) -> int:
        """Send the batch's deliveries to the agents."""
        if not self._queued:
            return -1
        queued, self._queued = self._queued, {}
        deliveries = [
            runtime().deliveries.start(plan, first, pages) for plan, first, pages in queued.values()
        ]
        return self.layer_done_counter.add(deliveries)

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """Wait for the last layers; True when every delivery of the batch landed."""
        engine = runtime()
        last_layer = engine.memory.layout.num_layers - 1
        for delivery in self.layer_done_counter.take(counter_index):
            engine.deliveries.wait_layer(delivery, last_layer)
            if delivery.error:
                self._fail(engine, delivery)
        return not self._failed

    def _fail(self, engine: EngineRuntime, delivery: Delivery) -> None:
        log.warning("delivery failed rid=%s reason=%r", delivery.rid, delivery.error)
        engine.deliveries.abandon(delivery)
        self._failed.add(delivery.rid)

    def take_failed(self) -> set[str]:
        """Requests whose KV did not land since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    def reset(self) -> None:
        self._found.clear()
        self._queued.clear()
        self._failed.clear()
        self.layer_done_counter.reset()

    def close(self) -> None:
        self.reset()

    # ---- persistence is the decode engine's: each block is stored once ----

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        return False

    def num_completed_offloads(self) -> int:
        return 0

    def pop_completed_offload(self) -> bool:
        raise RuntimeError("a prefill engine persists nothing")


def _keys(transfers: list[PoolTransfer]) -> list[str]:
    return next(t for t in transfers if t.name == PoolName.KV).keys or []


def only_failed_requests(original: Any, wrapper: Any) -> list[str]:
    """AROUND ``UnifiedCacheLinkerWrapper.finish_loads``: SGLang aborts every loading
    request of the batch when one load fails; only those need to go that failed at a rank."""
    rids = list(wrapper.inflight_load_rids)
    original(wrapper)
    failed = wrapper.cache_linker.take_failed()
    landed = runtime().ranks.all_of([rid not in failed for rid in rids])
    return [rid for rid, here in zip(rids, landed, strict=True) if not here]
