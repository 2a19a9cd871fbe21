"""The functions of SGLang that call us. Nothing is hooked in a process that was not started as
a DualPath engine."""

from __future__ import annotations

from engine.sglang.border import Hook
from engine.sglang.http.hooks import HTTP
from engine.sglang.states import hooks as states
from engine.sglang.weights.hooks import WEIGHTS

_SCHEDULER = "managers.scheduler.Scheduler."
_COMPONENTS = "managers.scheduler_components."
_ALLOCATOR = "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator."
_TREE = "mem_cache.unified_radix_cache.UnifiedRadixCache."
_MHA = "mem_cache.memory_pool.MHATokenToKVPool."
_MLA = "mem_cache.memory_pool.MLATokenToKVPool."
_HYBRID = "layers.attention.hybrid_linear_attn_backend."
_SENDS = "disaggregation.mooncake.conn.MooncakeKVManager."
_PREALLOC = "disaggregation.decode.DecodePreallocQueue."
_TRANSFER = "disaggregation.decode.DecodeTransferQueue."

EVERY_ENGINE = (
    *HTTP,
    Hook(
        "distributed.device_communicators.mooncake_transfer_engine.init_mooncake_transfer_engine",
        "before",
        "engine.sglang.rank_ports:before_mooncake",
        "each rank's Mooncake takes ports that no other rank takes: it looks for a free one "
        "some time before it binds it",
    ),
    Hook(
        "distributed.device_communicators.mooncake_transfer_engine.MooncakeTransferEngine"
        ".batch_register",
        "after",
        "engine.sglang.startup:after_batch_register",
        "SGLang goes on where memory could not be registered, and every transfer fails",
    ),
    Hook(
        "distributed.device_communicators.mooncake_transfer_engine.init_mooncake_transfer_engine",
        "after",
        "engine.sglang.rank_ports:after_ports_open",
        "Mooncake listens on every address, and asks nobody who it is",
    ),
    Hook(
        "distributed.bootstrap._init_parallel_groups",
        "after",
        "engine.sglang.rank_ports:after_ports_open",
        "so does torch's rendezvous",
    ),
    Hook(
        "managers.load_snapshot.shm_path_for",
        "after",
        "engine.sglang.startup:after_shm_path_for",
        "a file in `/dev/shm` of a name drawn at random: when the engine is killed, it stays",
    ),
    Hook(
        _SCHEDULER + "init_disaggregation",
        "after",
        "engine.sglang.startup:after_init_disaggregation",
        "KV pool, Mooncake engine and P/D queues exist: start our runtime",
    ),
    Hook(
        _SCHEDULER + "run_event_loop",
        "around",
        "engine.sglang.last_words:around_event_loop",
        "a scheduler that ends itself says what it was at work on",
    ),
    Hook(
        "sampling.sampling_batch_info.SamplingBatchInfo._apply_post_grammar_logits_transforms",
        "after",
        "engine.sglang.sampling_hooks:after_grammar",
        "where a grammar allows no token, drawing one from the probabilities ends the engine",
    ),
    Hook(
        _COMPONENTS + "request_receiver.SchedulerRequestReceiver._broadcast_reqs_across_ranks",
        "around",
        "engine.sglang.rank_hooks:around_broadcast",
        "plans and ends of transfers take effect at all ranks at the same point",
    ),
    Hook(
        _ALLOCATOR + "_release_page_ids",
        "around",
        "engine.sglang.pool_hooks:around_release",
        "every freed page passes here: pages under a transfer are not given out again",
    ),
    Hook(
        _ALLOCATOR + "available_size",
        "before",
        "engine.sglang.pool_hooks:before_available_size",
        "asked before each admission: return pages whose transfers have ended, in the "
        "scheduler's own thread",
    ),
    Hook(
        _ALLOCATOR + "clear",
        "after",
        "engine.sglang.pool_hooks:after_clear",
        "a flush frees every page: keep those under a transfer out",
    ),
    Hook(
        _COMPONENTS + "pool_stats_observer.SchedulerPoolStatsObserver.session_held_tokens",
        "after",
        "engine.sglang.pool_hooks:after_session_held",
        "pages kept back stay accounted for in SGLang's leak check, which stays on",
    ),
    Hook(
        _COMPONENTS + "pool_stats_observer.SchedulerPoolStatsObserver.session_held_swa_tokens",
        "after",
        "engine.sglang.pool_hooks:after_session_held_windows",
        "the same of the windows' pool",
    ),
    Hook(
        _SCHEDULER + "flush_cache",
        "after",
        "engine.sglang.pool_hooks:after_flush",
        "what comes of older weights has gone; tests: fill freed pages with noise",
    ),
    Hook(
        _TREE + "on_release",
        "after",
        "engine.sglang.pool_hooks:after_request_release",
        "benchmarks only: forget prefixes that no request needs, so that every hit is delivered",
    ),
    *WEIGHTS,
)

PREFILL = (
    Hook(
        "model_executor.model_runner.ModelRunner.forward",
        "around",
        "engine.sglang.prefill.timing_hooks:around_forward",
        "time each prefill forward, for quota chunking and for the choice between load and "
        "recompute",
    ),
    Hook(
        "layers.attention.base_attn_backend.AttentionBackend.forward",
        "around",
        "engine.sglang.prefill.forward_hooks:around_backend_attention",
        "a layer's attention has run, also where CUDA graphs are replayed: its new KV can leave; "
        "and it is timed, which the quota is about",
    ),
    Hook(
        _HYBRID + "HybridLinearAttnBackend.forward",
        "around",
        "engine.sglang.prefill.forward_hooks:around_hybrid_attention",
        "the same of a model with recurrent layers, which are timed too",
    ),
    Hook(
        _HYBRID + "Mamba2AttnBackend.forward",
        "around",
        "engine.sglang.prefill.forward_hooks:around_recurrence",
        "the same of Mamba-2, which is called by itself",
    ),
    Hook(
        _SCHEDULER + "get_prefill_adder_class",
        "after",
        "engine.sglang.prefill.quota_adder:after_adder_class",
        "pack each prefill batch to the quota: a subclass of `PrefillAdder` that lowers what "
        "SGLang may take of a request",
    ),
    Hook(
        _MHA + "_create_buffers_normal",
        "around",
        "engine.sglang.prefill.window_pool:around_create_buffers",
        "layer window: buffers for W layers, each shared by several",
    ),
    Hook(
        _MLA + "_create_buffers",
        "around",
        "engine.sglang.prefill.window_pool:around_create_buffers",
        "layer window: buffers for W layers, each shared by several",
    ),
    Hook(
        _MHA + "get_kv_size_bytes",
        "after",
        "engine.sglang.prefill.window_pool:after_kv_size",
        "layer window: shared buffers are counted once",
    ),
    Hook(
        _MLA + "get_kv_size_bytes",
        "after",
        "engine.sglang.prefill.window_pool:after_kv_size",
        "layer window: shared buffers are counted once",
    ),
    Hook(
        "model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
        "after",
        "engine.sglang.prefill.window_pool:after_cell_size",
        "layer window: a token takes W/L of the memory, so the pool has L/W times the tokens",
    ),
    Hook(
        "models.utils.enable_fused_set_kv_buffer",
        "around",
        "engine.sglang.prefill.window_pool:around_fused_write",
        "layer window: no kernel writes KV before its buffer is known to be free (CUDA: untested)",
    ),
    Hook(
        _MLA + "set_mla_kv_buffer",
        "before",
        "engine.sglang.prefill.forward_hooks:before_latent_write",
        "layer window: a latent is written only when its buffer is free, also where that "
        "precedes the attention (CUDA: untested)",
    ),
    Hook(
        "mem_cache.index_key_cache.IndexKeyCache.get_local_buffer",
        "before",
        "engine.sglang.prefill.forward_hooks:before_index_read",
        "layer window, sparse attention: the indexer reads a layer's prefix before its attention "
        "is called",
    ),
    Hook(
        "disaggregation.prefill.PrefillBootstrapQueue.add",
        "before",
        "engine.sglang.prefill.request_hooks:before_add_request",
        "refuse what was planned under other weights; layer window: nothing enters the radix tree",
    ),
    Hook(
        _TREE + "finish_external_linker_loads",
        "after",
        "engine.sglang.prefill.forward_hooks:after_finish_loads",
        "layer window: requests whose prefix did not come are dropped, on all ranks alike",
    ),
    Hook(
        _SCHEDULER + "run_batch",
        "before",
        "engine.sglang.prefill.forward_hooks:before_run_batch",
        "a forward begins: plan what leaves for which decode engine after each layer",
    ),
    Hook(
        _SCHEDULER + "run_batch",
        "after",
        "engine.sglang.prefill.forward_hooks:after_run_batch",
        "the forward has been launched",
    ),
    Hook(
        "disaggregation.prefill.SchedulerDisaggregationPrefillMixin.process_disagg_prefill_inflight_queue",
        "around",
        "engine.sglang.prefill.request_hooks:around_inflight",
        "a batch is not formed of the memory that the one before, whose pages are about to be "
        "free, has left over",
    ),
    Hook(
        "layers.radix_attention.RadixAttention.forward",
        "around",
        "engine.sglang.prefill.forward_hooks:around_layer_attention",
        "the same for kinds of attention that the hook on the backend does not see",
    ),
    Hook(
        _SENDS + "add_transfer_request",
        "around",
        "engine.sglang.prefill.send_hooks:around_add_transfer",
        "SGLang's send of a chunk waits for the layers that left by themselves, and sends "
        "nothing twice",
    ),
    Hook(
        _SENDS + "_maybe_ack_drained_abort",
        "around",
        "engine.sglang.prefill.send_hooks:around_drained_abort",
        "a decode engine keeps an aborted request's pages while layers are on their way",
    ),
    Hook(
        "mem_cache.unified_cache.unified_cache_linker.UnifiedCacheLinkerWrapper.finish_loads",
        "around",
        "engine.sglang.prefill.linker:only_failed_requests",
        "a failed delivery drops its own request, not its batch-mates",
    ),
)

DECODE = (
    Hook(
        "mem_cache.kv_cache_builder.validate_decode_radix_cache",
        "around",
        "engine.sglang.decode.restore_hooks:around_validation",
        "DeepSeek-V4; without: SGLang refuses its windows by page beside a decode engine's cache",
    ),
    Hook(
        _PREALLOC + "_match_prefix_and_lock",
        "around",
        "engine.sglang.decode.restore_hooks:around_match",
        "layer window: promise P only a prefix that agents can bring to it as well",
    ),
    Hook(
        "disaggregation.decode_hicache_mixin.DecodeHiCachePreallocMixin._build_decode_prefix_match",
        "after",
        "engine.sglang.decode.restore_hooks:after_prefix_match",
        "promise P the plan's blocks in `decode_prefix_len`",
    ),
    Hook(
        _PREALLOC + "_pre_alloc",
        "around",
        "engine.sglang.decode.restore_hooks:around_pre_alloc",
        "allocate pages for the promised prefix",
    ),
    Hook(
        _PREALLOC + "_allocatable_token_budgets",
        "after",
        "engine.sglang.decode.restore_hooks:less_unevictable",
        "pages under a transfer cannot be evicted for a new request",
    ),
    Hook(
        _PREALLOC + "_swa_tail_allocatable_token_budget",
        "after",
        "engine.sglang.decode.restore_hooks:less_unevictable_windows",
        "the same of the windows' pool",
    ),
    Hook(
        _TRANSFER + "extend",
        "before",
        "engine.sglang.decode.restore_hooks:before_transfer_extend",
        "start the delivery of the prefix",
    ),
    Hook(
        "disaggregation.common.staging_handler.DecodeStagingHandler._scatter_region",
        "around",
        "engine.sglang.decode.restore_hooks:around_scatter",
        "what P sends begins after the promised prefix, also through a staging buffer (unlike "
        "tensor parallel sizes)",
    ),
    Hook(
        _TRANSFER + "_pollers",
        "around",
        "engine.sglang.decode.restore_hooks:gated_pollers",
        "a request decodes only when its prefix is whole",
    ),
    Hook(
        _TRANSFER + "_commit_transfer_to_req",
        "around",
        "engine.sglang.decode.restore_hooks:around_commit",
        "the restored pages are the request's own; release the plan; begin persisting",
    ),
    Hook(
        _TRANSFER + "_release_request",
        "before",
        "engine.sglang.decode.restore_hooks:before_release",
        "cancel the delivery of a failed or aborted request",
    ),
    Hook(
        "disaggregation.checksum.page_indices_for_request",
        "around",
        "engine.sglang.decode.checksum_hooks:around_page_indices",
        "P digests what it sends, which begins after the promised prefix",
    ),
    Hook(
        "disaggregation.decode.SchedulerDisaggregationDecodeMixin._handle_kv_checksum_mismatch",
        "before",
        "engine.sglang.decode.checksum_hooks:before_mismatch",
        "count requests whose KV is not what P sent, and store nothing of them",
    ),
    Hook(
        _SCHEDULER + "_release_aborted_request",
        "before",
        "engine.sglang.decode.checksum_hooks:before_release_aborted",
        "store nothing of a request aborted before its KV was compared with what P sent",
    ),
    Hook(
        _SCHEDULER + "process_batch_result",
        "after",
        "engine.sglang.decode.persist_hooks:after_batch_result",
        "offer blocks to the agent as soon as they are full",
    ),
    Hook(
        _TREE + "checkpoint",
        "before",
        "engine.sglang.decode.persist_hooks:before_checkpoint",
        "offer the last blocks while the request still has its pages",
    ),
)

OF_ROLE: dict[str, tuple[Hook, ...]] = {
    "prefill": EVERY_ENGINE + states.EVERY_ENGINE + PREFILL + states.PREFILL,
    "decode": EVERY_ENGINE + states.EVERY_ENGINE + DECODE,
}
