"""Prefill engine: SGLang's external-cache linker, which asks :mod:`engine.prefill.hit_loads`.

SGLang asks a linker for a request's restorable prefix, hands it device pages, and lets each
layer's attention wait for that layer (sglang/srt/mem_cache/unified_cache/
unified_cache_linker.py). A prefill engine is given this one by flag.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from engine.prefill.hit_loads import HitLoads, LayerGate
from engine.runtime import runtime, runtime_if_up
from engine.sglang.border import Use
from engine.sglang.kv_pool import allocators_of

_LINKER = "mem_cache.unified_cache.unified_cache_linker."

USES = (
    Use(_LINKER + "UnifiedCacheLinker", "what a linker has to be"),
    Use(_LINKER + "UnifiedCacheLinker.pools", "what is restored: KV, windows and states"),
    Use(_LINKER + "UnifiedCacheLinker.layer_done_counter", "asked before each layer's attention"),
    Use(_LINKER + "UnifiedCacheLinker.forward_stream", "kept for it, as its docstring asks"),
    Use(_LINKER + "UnifiedCacheLinkerWrapper.inflight_load_rids", "the batch's loads"),
    Use("mem_cache.hicache_storage.PoolName.KV", "the pool of the blocks"),
    Use("mem_cache.hicache_storage.PoolName.SWA", "that of the windows"),
    Use("mem_cache.hicache_storage.PoolName.MAMBA", "that of the states"),
    Use("mem_cache.hicache_storage.PoolTransfer.name", "of which pool a transfer is"),
    Use("mem_cache.hicache_storage.PoolTransfer.keys", "page hashes, in hexadecimal"),
    Use("mem_cache.hicache_storage.PoolTransfer.device_indices", "rows to be filled"),
    Use("mem_cache.cache_init_params.CacheInitParams.token_to_kv_pool_allocator", "has the pool"),
    Use("mem_cache.cache_init_params.CacheInitParams.page_size", "tokens of a page"),
    Use("mem_cache.cache_init_params.CacheInitParams.req_to_token_pool", "has the states"),
    Use("mem_cache.memory_pool.HybridReqToTokenPool.mamba_pool", "their pool"),
    Use(
        "mem_cache.memory_pool.HybridReqToTokenPool.register_layer_transfer_counter",
        "recurrent layers wait for their states",
    ),
    Use("mem_cache.allocator.base.BaseTokenToKVPoolAllocator.get_kvcache", "the pool"),
)


_POOL_OF = {"window": PoolName.SWA, "state": PoolName.MAMBA}
"""Where a part of its kind lies."""


def _loads() -> HitLoads:
    return runtime().hit_loads


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
        allocators = allocators_of(params.token_to_kv_pool_allocator)
        names = (PoolName.KV, PoolName.SWA)[: len(allocators)]
        self.pools = {
            name: allocator.get_kvcache() for name, allocator in zip(names, allocators, strict=True)
        }
        self.layer_done_counter = LayerGate()
        if hasattr(params.req_to_token_pool, "mamba_pool"):
            self.pools[PoolName.MAMBA] = params.req_to_token_pool.mamba_pool
            # SGLang has the pool of KV ask it, and not that of the states.
            params.req_to_token_pool.register_layer_transfer_counter(self.layer_done_counter)
        self.forward_stream = forward_stream
        self._page_tokens = {
            name: 1 if name == PoolName.MAMBA else params.page_size for name in self.pools
        }

    # ---- the scheduler's thread ----

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Restorable prefix lengths, in pages, of the tail that the device lacks."""
        hashes = [bytes.fromhex(key) for key in _of(PoolName.KV, transfers).keys or []]
        return list(_loads().look_up(rid, hashes))

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Queue the delivery of the found pages into the device pages given."""
        places = {
            name: runtime().streams.pages(_of(name, transfers).device_indices, page_tokens)
            for name, page_tokens in self._page_tokens.items()
        }
        of_parts = [places[_POOL_OF[each.kind]] for each in runtime().weights.namespace.parts]
        _loads().queue(rid, places[PoolName.KV], of_parts)
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        """Drop a load that has not started."""
        return _loads().cancel(rid)

    def start_layer_wise_loading(self) -> int:
        """Send the batch's deliveries to the agents."""
        batch = _loads().start()
        return self.layer_done_counter.add(batch) if batch is not None else -1

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """Wait for the last layers; True when every delivery of the batch landed."""
        batch = self.layer_done_counter.take(counter_index)
        return batch is None or _loads().finish(batch)

    def reset(self) -> None:
        """Also before the runtime is up."""
        self.layer_done_counter.reset()
        engine = runtime_if_up()
        if engine is not None:
            engine.hit_loads.reset()

    def close(self) -> None:
        self.reset()

    # ---- persistence is the decode engine's: each block is stored once ----

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        return False

    def num_completed_offloads(self) -> int:
        return 0

    def pop_completed_offload(self) -> bool:
        raise RuntimeError("a prefill engine persists nothing")


def _of(pool: PoolName, transfers: list[PoolTransfer]) -> PoolTransfer:
    return next(t for t in transfers if t.name == pool)


def only_failed_requests(original: Any, wrapper: Any) -> list[str]:
    """AROUND ``UnifiedCacheLinkerWrapper.finish_loads``: SGLang aborts every loading
    request of the batch when one load fails; only those need to go that failed at a rank."""
    rids = list(wrapper.inflight_load_rids)
    original(wrapper)
    failed = _loads().take_failed()
    landed = runtime().ranks.all_of([rid not in failed for rid in rids])
    return [rid for rid, here in zip(rids, landed, strict=True) if not here]
