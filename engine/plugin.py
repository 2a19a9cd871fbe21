"""Entry point of the SGLang plugin, and the table of every place where SGLang is touched.

``docs/sglang.md`` renders this table with what to check for a newer SGLang. Nothing is
hooked in a process that was not started as a DualPath engine.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple


class TouchPoint(NamedTuple):
    """One hooked SGLang name. ``kind`` is SGLang's HookType."""

    target: str
    kind: str
    hook: str
    """``module:function`` of ours."""
    reason: str
    role: str = "both"


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler."
_DECODE = "sglang.srt.disaggregation.decode."
_MIXIN = "sglang.srt.disaggregation.decode_hicache_mixin.DecodeHiCachePreallocMixin."
_ALLOCATOR = "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator."
_LINKER = "sglang.srt.mem_cache.unified_cache.unified_cache_linker.UnifiedCacheLinkerWrapper."
_POOLS = "sglang.srt.mem_cache.memory_pool."
_TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache."
_WEIGHTS = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
_MOONCAKE = "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager."
_POOL_STATS = (
    "sglang.srt.managers.scheduler_components.pool_stats_observer.SchedulerPoolStatsObserver."
)

TOUCH_POINTS = (
    TouchPoint(
        "sglang.srt.distributed.device_communicators.mooncake_transfer_engine"
        ".init_mooncake_transfer_engine",
        "BEFORE",
        "engine.sglang.rank_ports:before_mooncake",
        "each rank's Mooncake takes ports that no other one takes",
    ),
    TouchPoint(
        _SCHEDULER + "init_disaggregation",
        "AFTER",
        "engine.plugin:after_init_disaggregation",
        "KV pool, Mooncake engine and P/D queues exist: start the runtime",
    ),
    TouchPoint(
        "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver"
        "._broadcast_reqs_across_ranks",
        "AROUND",
        "engine.sglang.rank_hooks:around_broadcast",
        "plans and ends of transfers take effect at all ranks at the same point",
    ),
    TouchPoint(
        _ALLOCATOR + "_release_page_ids",
        "AROUND",
        "engine.sglang.pool_hooks:around_release",
        "pages under a transfer are not given out again",
    ),
    TouchPoint(
        _ALLOCATOR + "available_size",
        "BEFORE",
        "engine.sglang.pool_hooks:before_available_size",
        "return pages whose transfers have ended, in the scheduler's own thread",
    ),
    TouchPoint(
        _ALLOCATOR + "clear",
        "AFTER",
        "engine.sglang.pool_hooks:after_clear",
        "a flush frees every page: keep those under a transfer out",
    ),
    TouchPoint(
        _POOL_STATS + "session_held_tokens",
        "AFTER",
        "engine.sglang.pool_hooks:after_session_held",
        "pages kept back stay accounted for in SGLang's leak check",
    ),
    TouchPoint(
        _SCHEDULER + "flush_cache",
        "AFTER",
        "engine.sglang.pool_hooks:after_flush",
        "tests: poison the freed pages, so that a delivery that never happened is seen",
    ),
    TouchPoint(
        _TREE + "on_release",
        "AFTER",
        "engine.sglang.pool_hooks:after_request_release",
        "benchmarks: forget prefixes that no request needs, so that every hit is delivered",
    ),
    TouchPoint(
        _WEIGHTS + "update_weights_from_disk",
        "AFTER",
        "engine.sglang.pool_hooks:after_update_from_disk",
        "new weights, new namespace: older blocks become unreachable",
    ),
    TouchPoint(
        _WEIGHTS + "record_weight_version_after_update",
        "AFTER",
        "engine.sglang.pool_hooks:after_weight_version",
        "the same for updates from tensors, collectives and IPC",
    ),
    TouchPoint(
        "sglang.srt.model_executor.model_runner.ModelRunner.forward",
        "AROUND",
        "engine.sglang.prefill_hooks:around_forward",
        "time each prefill forward: for quota chunking, and the choice between load and recompute",
        "prefill",
    ),
    TouchPoint(
        "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.forward",
        "AROUND",
        "engine.sglang.prefill_hooks:around_attention",
        "time the attention in it, which the quota is about",
        "prefill",
    ),
    TouchPoint(
        _SCHEDULER + "get_prefill_adder_class",
        "AFTER",
        "engine.sglang.prefill_hooks:after_adder_class",
        "pack each prefill batch to the quota",
        "prefill",
    ),
    TouchPoint(
        _POOLS + "MHATokenToKVPool._create_buffers_normal",
        "AROUND",
        "engine.prefill.layer_ring:around_create_buffers",
        "layer window: buffers for W layers, each shared by several",
        "prefill",
    ),
    TouchPoint(
        _POOLS + "MLATokenToKVPool._create_buffers",
        "AROUND",
        "engine.prefill.layer_ring:around_create_buffers",
        "the same for MLA",
        "prefill",
    ),
    TouchPoint(
        _POOLS + "MHATokenToKVPool.get_kv_size_bytes",
        "AFTER",
        "engine.prefill.layer_ring:after_kv_size",
        "layer window: shared buffers are counted once",
        "prefill",
    ),
    TouchPoint(
        _POOLS + "MLATokenToKVPool.get_kv_size_bytes",
        "AFTER",
        "engine.prefill.layer_ring:after_kv_size",
        "the same for MLA",
        "prefill",
    ),
    TouchPoint(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
        "AFTER",
        "engine.prefill.layer_ring:after_cell_size",
        "layer window: a token takes W/L of the memory, so the pool has L/W times the tokens",
        "prefill",
    ),
    TouchPoint(
        "sglang.srt.models.utils.enable_fused_set_kv_buffer",
        "AROUND",
        "engine.prefill.layer_ring:around_fused_write",
        "layer window: no kernel writes KV before its buffer is known to be free",
        "prefill",
    ),
    TouchPoint(
        _POOLS + "MLATokenToKVPool.set_mla_kv_buffer",
        "BEFORE",
        "engine.sglang.prefill_layer_hooks:before_latent_write",
        "layer window: a latent is written only when its buffer is free",
        "prefill",
    ),
    TouchPoint(
        "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue.add",
        "BEFORE",
        "engine.sglang.prefill_layer_hooks:before_add_request",
        "refuse what was planned under other weights; layer window: nothing enters the radix tree",
        "prefill",
    ),
    TouchPoint(
        _TREE + "finish_external_linker_loads",
        "AFTER",
        "engine.sglang.prefill_layer_hooks:after_finish_loads",
        "layer window: requests whose prefix did not come are dropped, on all ranks alike",
        "prefill",
    ),
    TouchPoint(
        _SCHEDULER + "run_batch",
        "BEFORE",
        "engine.sglang.prefill_layer_hooks:before_run_batch",
        "a forward begins: plan what leaves for which decode engine after each layer",
        "prefill",
    ),
    TouchPoint(
        _SCHEDULER + "run_batch",
        "AFTER",
        "engine.sglang.prefill_layer_hooks:after_run_batch",
        "the forward has been launched",
        "prefill",
    ),
    TouchPoint(
        "sglang.srt.disaggregation.prefill.SchedulerDisaggregationPrefillMixin"
        ".process_disagg_prefill_inflight_queue",
        "AROUND",
        "engine.sglang.prefill_layer_hooks:around_inflight",
        "a batch is not formed of what the one before has left over",
        "prefill",
    ),
    TouchPoint(
        "sglang.srt.layers.radix_attention.RadixAttention.forward",
        "AROUND",
        "engine.sglang.prefill_layer_hooks:around_attention",
        "a layer's attention has run: its new KV can leave",
        "prefill",
    ),
    TouchPoint(
        _MOONCAKE + "add_transfer_request",
        "AROUND",
        "engine.sglang.prefill_layer_hooks:around_add_transfer",
        "SGLang's send of a chunk waits for the layers that left by themselves",
        "prefill",
    ),
    TouchPoint(
        _MOONCAKE + "_maybe_ack_drained_abort",
        "AROUND",
        "engine.sglang.prefill_layer_hooks:around_drained_abort",
        "a decode engine keeps an aborted request's pages while layers are on their way",
        "prefill",
    ),
    TouchPoint(
        _LINKER + "finish_loads",
        "AROUND",
        "engine.sglang.prefill_linker:only_failed_requests",
        "a failed delivery drops its own request, not its batch-mates",
        "prefill",
    ),
    TouchPoint(
        _DECODE + "DecodePreallocQueue._match_prefix_and_lock",
        "AROUND",
        "engine.sglang.decode_restore:around_match",
        "layer window: promise P only a prefix that agents can bring to it as well",
        "decode",
    ),
    TouchPoint(
        _MIXIN + "_build_decode_prefix_match",
        "AFTER",
        "engine.sglang.decode_restore:after_prefix_match",
        "promise P the plan's blocks as decode_prefix_len",
        "decode",
    ),
    TouchPoint(
        _DECODE + "DecodePreallocQueue._pre_alloc",
        "AROUND",
        "engine.sglang.decode_restore:around_pre_alloc",
        "allocate pages for the promised prefix",
        "decode",
    ),
    TouchPoint(
        _DECODE + "DecodePreallocQueue._allocatable_token_budgets",
        "AFTER",
        "engine.sglang.decode_restore:less_unevictable",
        "pages under a transfer cannot be evicted for a new request",
        "decode",
    ),
    TouchPoint(
        _DECODE + "DecodeTransferQueue.extend",
        "BEFORE",
        "engine.sglang.decode_restore:before_transfer_extend",
        "start the delivery of the prefix",
        "decode",
    ),
    TouchPoint(
        "sglang.srt.disaggregation.common.staging_handler.DecodeStagingHandler._scatter_region",
        "AROUND",
        "engine.sglang.decode_restore:around_scatter",
        "what P sends begins after the promised prefix, also through a staging buffer",
        "decode",
    ),
    TouchPoint(
        _DECODE + "DecodeTransferQueue._pollers",
        "AROUND",
        "engine.sglang.decode_restore:gated_pollers",
        "a request decodes only when its prefix is whole; a failed one fails alone",
        "decode",
    ),
    TouchPoint(
        _DECODE + "DecodeTransferQueue._commit_transfer_to_req",
        "AROUND",
        "engine.sglang.decode_restore:around_commit",
        "restored pages are the request's own; release the plan; begin persisting",
        "decode",
    ),
    TouchPoint(
        _DECODE + "DecodeTransferQueue._release_request",
        "BEFORE",
        "engine.sglang.decode_restore:before_release",
        "cancel the delivery of a failed or aborted request",
        "decode",
    ),
    TouchPoint(
        _SCHEDULER + "process_batch_result",
        "AFTER",
        "engine.sglang.persist_hooks:after_batch_result",
        "offer blocks as soon as they are full",
        "decode",
    ),
    TouchPoint(
        _TREE + "checkpoint",
        "BEFORE",
        "engine.sglang.persist_hooks:before_checkpoint",
        "offer the last blocks while the request still has its pages",
        "decode",
    ),
)


def register() -> None:
    """Entry point of group ``sglang.srt.plugins``; runs in every SGLang process."""
    from engine.config import EngineConfig
    from engine.sglang.cpu import platform as cpu_platform

    if cpu_platform.is_active():
        cpu_platform.register_fixes()
    if EngineConfig.VARIABLE not in os.environ:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    config = EngineConfig.from_env()
    for point in TOUCH_POINTS:
        if point.role in ("both", config.role):
            HookRegistry.register(point.target, _lazily(point.hook), HookType[point.kind])


def _lazily(hook: str) -> Any:
    # SGLang loads plugins before its own modules: ours may import them only when called.
    module, name = hook.split(":")

    def call(*args: Any, **kwargs: Any) -> Any:
        import importlib

        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call


def after_init_disaggregation(result: Any, scheduler: Any) -> None:
    """Start the runtime once SGLang's P/D side exists (scheduler process only)."""
    from engine.config import EngineConfig
    from engine.runtime import start_runtime
    from engine.sglang.pool_hooks import poison

    engine = start_runtime(EngineConfig.from_env(), scheduler)
    if engine.config.role == "prefill":
        from sglang.srt.mem_cache.utils import get_hash_str

        get_hash_str([0])  # compiled at first use: 5 s that some request would wait for
    if engine.config.poison_kv:
        poison(engine)
