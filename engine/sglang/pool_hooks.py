"""Hooks on SGLang's page allocator, its leak check, flushes and weight updates.

Both roles use them; what they protect is told in :mod:`engine.transfers.page_holds`. Before the
runtime is up (the allocator is built first) they do nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from engine.kv_memory import poison
from engine.runtime import EngineRuntime, runtime, runtime_if_up
from engine.sglang.border import Use

_ALLOCATOR = "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator."
_TREE = "mem_cache.unified_radix_cache.UnifiedRadixCache."

USES = (
    Use(_ALLOCATOR + "_release_page_ids", "give back pages whose transfers have ended"),
    Use(_ALLOCATOR + "free_pages", "of which dtype and where page numbers are"),
    Use(_ALLOCATOR + "get_kvcache", "the pool that is poisoned"),
    Use(_ALLOCATOR + "page_size", "tokens of a page there"),
    Use("mem_cache.memory_pool.MLATokenToKVPool.kv_buffer", "its memory"),
    Use("mem_cache.memory_pool.MHATokenToKVPool.k_buffer", "its memory"),
    Use("mem_cache.memory_pool.MHATokenToKVPool.v_buffer", "its memory"),
    Use("mem_cache.base_prefix_cache.EvictParams.num_tokens", "evict all that may be"),
    Use(_TREE + "evict", "benchmarks: forget prefixes"),
    Use(_TREE + "evictable_size", "how much that is"),
    Use("managers.io_struct.UpdateWeightFromDiskReqInput.weight_version", "the version's name"),
    Use("managers.io_struct.UpdateWeightFromDiskReqInput.model_path", "the weights' folder"),
)


def _engine_of(allocator: Any) -> EngineRuntime | None:
    engine = runtime_if_up()
    return engine if engine is not None and engine.holds.allocator is allocator else None


def around_release(original: Any, allocator: Any, *page_ids: torch.Tensor) -> None:
    """AROUND ``_release_page_ids``, where every freed page passes."""
    engine = _engine_of(allocator)
    if engine is not None:
        page_ids = tuple(engine.holds.keep_back(ids) for ids in page_ids)
    original(allocator, *page_ids)


def before_available_size(allocator: Any) -> None:
    """BEFORE ``available_size``, which every admission decision asks."""
    engine = _engine_of(allocator)
    pages = engine.holds.take_returned() if engine is not None else []
    if pages:
        free = allocator.free_pages
        allocator._release_page_ids(torch.tensor(pages, dtype=free.dtype, device=free.device))


def after_clear(result: Any, allocator: Any) -> None:
    """AFTER ``clear``."""
    engine = _engine_of(allocator)
    if engine is not None:
        engine.holds.after_clear()


def after_session_held(result: int, observer: Any) -> int:
    """AFTER ``session_held_tokens``."""
    engine = runtime_if_up()
    return result if engine is None else result + engine.holds.deferred_tokens


def after_flush(result: Any, scheduler: Any, *_: Any, **__: Any) -> None:
    """AFTER ``flush_cache``."""
    engine = runtime_if_up()
    if result and engine is not None and engine.config.experiment.poison_kv:
        poison_pool(engine)


def after_request_release(result: Any, tree: Any, *_: Any, **__: Any) -> None:
    """AFTER ``UnifiedRadixCache.on_release``: the request has let go of its prefix."""
    engine = runtime_if_up()
    if engine is None or engine.config.experiment.keep_prefixes:
        return
    tree.evict(EvictParams(num_tokens=tree.evictable_size()))


def poison_pool(engine: EngineRuntime) -> None:
    """Fill the pool with noise, except pages that an agent is still reading."""
    allocator = engine.holds.allocator
    pool: Any = allocator.get_kvcache()
    buffers = pool.kv_buffer if hasattr(pool, "kv_buffer") else [*pool.k_buffer, *pool.v_buffer]
    poison(buffers, allocator.page_size, engine.holds.held_pages())


def after_update_from_disk(result: Any, updater: Any, recv_req: Any) -> None:
    """AFTER ``update_weights_from_disk``: the new weights are those of a folder."""
    if result.success:
        runtime().weights.changed(recv_req.weight_version, recv_req.model_path)


def after_weight_version(result: Any, updater: Any, weight_version: str | None) -> None:
    """AFTER ``record_weight_version_after_update`` (called by every kind of update)."""
    runtime().weights.changed(weight_version, None)
