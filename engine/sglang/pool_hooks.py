"""Hooks on SGLang's page allocator, its leak check and flushes.

Both roles use them; what they protect is told in :mod:`engine.transfers.page_holds`. Before the
runtime is up (the allocator is built first) they do nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from engine.kv_memory import poison, poison_index_keys
from engine.runtime import EngineRuntime, runtime_if_up
from engine.sglang.border import Use
from engine.sglang.pools import deepseek_v4
from engine.sglang.states.pool import StateSlots, spares_of
from engine.transfers.page_holds import PageHolds

_ALLOCATOR = "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator."
_TREE = "mem_cache.unified_radix_cache.UnifiedRadixCache."

USES = (
    Use(_ALLOCATOR + "_release_page_ids", "give back pages whose transfers have ended"),
    Use(_ALLOCATOR + "free_pages", "of which dtype and where page numbers are"),
    Use(_ALLOCATOR + "get_kvcache", "the pool that is poisoned"),
    Use(_ALLOCATOR + "page_size", "tokens of a page there"),
    Use("mem_cache.memory_pool.MLATokenToKVPool.kv_buffer", "its memory"),
    Use("mem_cache.memory_pool.MLATokenToKVPool.dtype", "what its bytes are"),
    Use("mem_cache.memory_pool.MHATokenToKVPool.dtype", "what its bytes are"),
    Use("mem_cache.memory_pool.MHATokenToKVPool.k_buffer", "its memory"),
    Use("mem_cache.memory_pool.MHATokenToKVPool.v_buffer", "its memory"),
    Use("mem_cache.memory_pool.DSATokenToKVPool.index_k_with_scale_buffer", "its memory"),
    Use("mem_cache.memory_pool.HybridLinearKVPool.full_kv_pool", "KV beside recurrent layers"),
    Use("mem_cache.memory_pool.HybridLinearKVPool.mamba_pool", "their states"),
    Use("mem_cache.memory_pool.MambaPool.mamba_cache", "the memory of these"),
    Use("mem_cache.memory_pool.MambaPool.State.conv", "inputs of convolutions"),
    Use("mem_cache.memory_pool.MambaPool.State.temporal", "recurrences"),
    Use("mem_cache.memory_pool.DSATokenToKVPool.index_head_dim", "bytes of a key in it"),
    Use("mem_cache.base_prefix_cache.EvictParams.num_tokens", "evict all that may be"),
    Use(_TREE + "evict", "benchmarks: forget prefixes"),
    Use(_TREE + "evictable_size", "how much that is"),
    Use("managers.scheduler.Scheduler.token_to_kv_pool_allocator", "has all pools"),
    Use("managers.scheduler.Scheduler.draft_worker", "has a draft, or is None"),
    Use("speculative.base_spec_worker.BaseSpecWorker.primary_draft_kv_pool", "a draft's KV"),
)


def _holds_of(allocator: Any) -> PageHolds | None:
    engine = runtime_if_up()
    return engine.holds.of(allocator) if engine is not None else None


def around_release(original: Any, allocator: Any, *page_ids: torch.Tensor) -> None:
    """AROUND ``_release_page_ids``, where every freed page passes."""
    holds = _holds_of(allocator)
    if holds is not None:
        page_ids = tuple(holds.keep_back(ids) for ids in page_ids)
    original(allocator, *page_ids)


def before_available_size(allocator: Any) -> None:
    """BEFORE ``available_size``, which every admission decision asks."""
    holds = _holds_of(allocator)
    pages = holds.take_returned() if holds is not None else []
    if pages:
        free = allocator.free_pages
        allocator._release_page_ids(torch.tensor(pages, dtype=free.dtype, device=free.device))


def after_clear(result: Any, allocator: Any) -> None:
    """AFTER ``clear``."""
    holds = _holds_of(allocator)
    if holds is not None:
        holds.after_clear()


def after_session_held(result: int, observer: Any) -> int:
    """AFTER ``session_held_tokens``."""
    engine = runtime_if_up()
    return result if engine is None else result + engine.holds.deferred_tokens


def after_session_held_windows(result: int, observer: Any) -> int:
    """AFTER ``session_held_swa_tokens``."""
    engine = runtime_if_up()
    parts = engine.holds.parts if engine is not None else ()
    return result + sum(part.deferred_tokens for part in parts)


def after_flush(result: Any, scheduler: Any, *_: Any, **__: Any) -> None:
    """AFTER ``flush_cache``."""
    engine = runtime_if_up()
    if not result or engine is None:
        return
    engine.weights.flushed()
    if engine.config.experiment.poison_kv:
        poison_pool(engine, scheduler)


def after_request_release(result: Any, tree: Any, *_: Any, **__: Any) -> None:
    """AFTER ``UnifiedRadixCache.on_release``: the request has let go of its prefix."""
    engine = runtime_if_up()
    if engine is None or engine.config.experiment.keep_prefixes:
        return
    tree.evict(EvictParams(num_tokens=tree.evictable_size()))


def draft_pool(scheduler: Any) -> Any:
    """Where the KV of a draft is; None without one."""
    worker = scheduler.draft_worker
    return worker.primary_draft_kv_pool if worker is not None else None


def poison_pool(engine: EngineRuntime, scheduler: Any) -> None:
    """Fill the pools with noise, a draft's too, except pages that an agent is still reading."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    if type(pool).__name__ == deepseek_v4.NAME:
        every = (engine.holds, *engine.holds.parts)
        deepseek_v4.poison(pool, *(holds.held_pages() for holds in every))
        return
    states = [holds for holds in engine.holds.parts if isinstance(holds.allocator, StateSlots)]
    held = [slot for holds in states[:1] for slot in holds.held_pages()]
    for holds in (engine.holds, *engine.holds.parts):
        if holds not in states:
            pool = _paged(holds.allocator.get_kvcache(), held)
            _poison(pool, holds)
    draft = draft_pool(scheduler)
    if draft is not None:
        _poison(draft, engine.holds)


def _paged(pool: Any, held_slots: list[int]) -> Any:
    """A pool of pages; of one with states beside it, whose free slots are poisoned here."""
    if not hasattr(pool, "mamba_pool"):
        return pool
    states = pool.mamba_pool.mamba_cache
    kept = [*held_slots, *spares_of(pool.mamba_pool)]
    for buffer in (*states.conv, states.temporal):
        poison(buffer.unbind(), buffer.dtype, 1, kept)
    return pool.full_kv_pool


def _poison(pool: Any, holds: PageHolds) -> None:
    page_tokens, held = holds.allocator.page_size, holds.held_pages()
    buffers = pool.kv_buffer if hasattr(pool, "kv_buffer") else [*pool.k_buffer, *pool.v_buffer]
    poison(buffers, pool.dtype, page_tokens, held)
    if hasattr(pool, "index_k_with_scale_buffer"):
        key_bytes = page_tokens * pool.index_head_dim
        poison_index_keys(pool.index_k_with_scale_buffer, key_bytes, held)
