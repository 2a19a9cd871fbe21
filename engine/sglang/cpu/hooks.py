"""What SGLang lacks on a machine without a GPU: functions of it that call us, and what fails
without. (Other fixes are the assignments of :mod:`engine.sglang.cpu.platform`.)"""

from __future__ import annotations

from engine.sglang.border import Hook

_GROUP = "distributed.parallel_state.GroupCoordinator."
_STAGING = "disaggregation.common."
_FIXES = "engine.sglang.cpu.fixes:"
_STAGING_FIXES = "engine.sglang.cpu.staging:"
_GROUP_FIXES = "engine.sglang.cpu.attention_groups:"
_INDEXER = "engine.sglang.cpu.sparse.indexer:"
_DRAFT = "engine.sglang.cpu.speculative:"
_ATTENTION = "engine.sglang.cpu.sparse.attention:"
_COMPRESSED = "engine.sglang.cpu.compressed.model:"
_WINDOWS = "engine.sglang.cpu.windows:"
_RECURRENT = "engine.sglang.cpu.recurrent."
_NATIVE = "layers.attention.torch_native_backend.TorchNativeAttnBackend."

EVERY_ENGINE = (
    Hook(
        "mem_cache.pool_host.base.HostKVCache.__init__",
        "before",
        _FIXES + "before_host_pool",
        'without: any host KV pool dies at start in `_cuda_host_register` ("Torch not compiled '
        "with CUDA enabled\"): a decode engine's retraction backup, or HiCache",
    ),
    Hook(
        _NATIVE + "_run_sdpa_forward_extend",
        "replace",
        _FIXES + "attention_of_new_tokens",
        "without (speed only): the attention of prefix and new queries is computed and the prefix "
        "rows are thrown away, so a cache hit saves none: 32 new tokens after 3968 cached ones "
        "take 0.78 s instead of 0.04 s",
    ),
    Hook(
        _NATIVE + "forward_extend",
        "around",
        _WINDOWS + "around_attention",
        "layers with a sliding window or sinks; without: sinks are a TypeError, and rows of a pool "
        "for windows are taken for those of the other: tokens are silently wrong",
    ),
    Hook(
        _NATIVE + "forward_decode",
        "around",
        _WINDOWS + "around_attention",
        "the same of single tokens",
    ),
    Hook(
        "managers.scheduler.Scheduler.on_idle",
        "after",
        _FIXES + "after_on_idle",
        "without (speed only): a scheduler that waits for a transfer or a peer, so is neither idle "
        "nor busy, spins at 100 % of a core even with `--sleep-on-idle`; with many engines on few "
        "cores the waiting ones starve the one that computes",
    ),
    Hook(
        "entrypoints.engine._set_envs_and_config",
        "after",
        _FIXES + "fork_from_now_on",
        "without (speed and memory only): SGLang spawns its schedulers and its detokenizer, and "
        "each imports SGLang, torch and transformers anew: 7 s of a core and 0.4 GB apiece",
    ),
    Hook(
        "layers.rotary_embedding.factory.get_rope_cpu",
        "around",
        _FIXES + "around_rope",
        "without: it knows only deepseek_yarn and raises for plain rotary embeddings (MLA)",
    ),
    Hook(
        "disaggregation.checksum.KvChecksumComputer.compute",
        "replace",
        _FIXES + "digest_of_pages",
        "`--disaggregation-enable-kv-checksum`; without: its kernel asserts that pages are on CUDA",
    ),
)

UNLIKE_SIZES = (
    Hook(
        _STAGING + "staging_buffer._check_kv_on_staging_device",
        "replace",
        _STAGING_FIXES + "any_device",
        'P and D of unlike sizes; without: "cpu:0", where the staging buffer is, counts as '
        'another device than "cpu"',
    ),
    Hook(
        _STAGING + "staging_handler.DecodeStagingHandler.__init__",
        "around",
        _STAGING_FIXES + "around_handler",
        "the same; without: D refuses KV buffers on a device without a number",
    ),
)

ATTENTION_GROUPS = (
    Hook(
        "layers.dp_attention.memcpy",
        "replace",
        _GROUP_FIXES + "copy_of_group",
        "`--attn-dp-size`; without: the first forward gathers the groups' tokens with a triton "
        'kernel and dies ("0 active drivers")',
    ),
    Hook(
        "model_executor.forward_batch_info.ForwardBatch.prepare_mlp_sync_batch",
        "before",
        _GROUP_FIXES + "before_groups_meet",
        "the same; without: before that it dies for a filling value that torch's native attention "
        "does not name, and for pinned memory",
    ),
    Hook(
        _GROUP + "all_gather_into_tensor",
        "replace",
        _GROUP_FIXES + "all_gather",
        "the same; without: it ends in an operator that only GPUs have",
    ),
    Hook(
        _GROUP + "reduce_scatter_tensor",
        "replace",
        _GROUP_FIXES + "reduce_scatter",
        "the same; without: it ends in an operator that only GPUs have",
    ),
    Hook(
        "layers.rotary_embedding.base.RotaryEmbedding.forward_native",
        "around",
        _GROUP_FIXES + "rotate_if_any",
        "the same; without: a group with nothing to do dies in the forward that it makes with the "
        "others",
    ),
    Hook(
        "managers.data_parallel_controller.DataParallelController.event_loop",
        "replace",
        _GROUP_FIXES + "hand_out_requests",
        "the same; without (speed only): the process that hands requests to the groups looks for "
        "them without a pause and takes a core: on two cores, those of P and D leave hardly any "
        "to the groups",
    ),
)

SPARSE_ATTENTION = (
    Hook(
        "arg_groups.model_hook.run_post_process_pass",
        "around",
        _ATTENTION + "around_post_process",
        "DeepSeek-V3.2; without: SGLang takes FlashMLA, and a type of KV for it",
    ),
    Hook(
        "layers.attention.dsa.dsa_indexer.Indexer.forward_native",
        "replace",
        _INDEXER + "choose",
        "the same; without: NotImplementedError",
    ),
    Hook(
        "layers.attention.dsa.dsa_indexer.rotate_activation",
        "replace",
        _INDEXER + "rotated",
        "the same; without: a CUDA kernel",
    ),
    Hook(
        "mem_cache.index_key_cache.IndexKeyCache.store_quantized",
        "replace",
        _INDEXER + "store",
        "the same; without: a triton kernel",
    ),
    Hook(
        "mem_cache.memory_pool.set_mla_kv_buffer_triton",
        "replace",
        _ATTENTION + "write_latents",
        "the same; without: a triton kernel",
    ),
    Hook(
        "mem_cache.memory_pool.quantize_k_cache_separate",
        "replace",
        _ATTENTION + "quantized_latents",
        "the same with float8 latents; without: a triton kernel",
    ),
)

_OF_COMPRESSED_ATTENTION = (
    ("models.deepseek_v4.fused_q_norm_rope", "normed_queries"),
    ("models.deepseek_v4.fused_rope_inplace", "rotate"),
    ("mem_cache.deepseek_v4_memory_pool.fused_k_norm_rope_flashmla", "store_normed"),
    ("models.deepseek_v4._apply_wo_a_bf16_matmul", "output_of_groups"),
    ("models.deepseek_v4.DeepseekV4DecoderLayerBase.hc_pre", "enter_hyper_connection"),
    ("models.deepseek_v4.DeepseekV4Model.hc_head", "leave_hyper_connections"),
)
COMPRESSED_ATTENTION = (
    Hook(
        "mem_cache.kv_cache_configurator.reject_out_of_tree_path",
        "around",
        _COMPRESSED + "around_rejection",
        "DeepSeek-V4; without: NotImplementedError for its pool, which is the same on a CPU",
    ),
    Hook(
        "entrypoints.openai.serving_chat.OpenAIServingChat._resolve_chat_encoding_spec",
        "around",
        _COMPRESSED + "around_encoding",
        "the same; without: the engine ends where there is no package `deepseek-recipe`, although "
        "the model has a template",
    ),
    *(
        Hook(target, "replace", _COMPRESSED + hook, "the same; without: a kernel for CUDA")
        for target, hook in _OF_COMPRESSED_ATTENTION
    ),
)

DRAFT = (
    Hook(
        "speculative.eagle_utils.build_tree_kernel_efficient_func",
        "replace",
        _DRAFT + "build_chain",
        "EAGLE, MTP; without: SGLang refuses a platform of a plugin's",
    ),
    Hook(
        "speculative.eagle_utils.verify_tree_greedy_func",
        "replace",
        _DRAFT + "verify_chain",
        "the same",
    ),
    Hook(
        "speculative.draft_utils.DraftBackendFactory._create_dsa_prefill_backend",
        "replace",
        _DRAFT + "sparse_backend",
        "a draft with sparse attention; without: its kernels for CUDA",
    ),
)

_OF_RECURRENT_LAYERS = (
    ("layers.attention.mamba.mamba.mamba_chunk_scan_combined", "mamba:scan"),
    ("layers.attention.mamba.mamba.selective_state_update", "mamba:step"),
    (
        "layers.attention.hybrid_linear_attn_backend.track_mamba_states_if_needed",
        "mamba:keep_states",
    ),
    (
        "layers.attention.hybrid_linear_attn_backend.track_mamba_states_all_layers",
        "mamba:keep_states_of_all_layers",
    ),
    ("layers.attention.linear.gdn_backend.causal_conv1d_fn", "conv:convolve"),
    ("layers.attention.linear.gdn_backend.causal_conv1d_update", "conv:convolve_token"),
    ("layers.attention.linear.gdn_backend.fused_gdn_gating", "gdn:gates"),
    ("layers.attention.linear.kernels.gdn_triton.chunk_gated_delta_rule", "gdn:prompts"),
    (
        "layers.attention.linear.kernels.gdn_triton.fused_sigmoid_gating_delta_rule_update",
        "gdn:tokens",
    ),
    ("layers.attention.linear.kda_backend.causal_conv1d_fn", "conv:convolve"),
    ("layers.attention.linear.kda_backend.causal_conv1d_update", "conv:convolve_token"),
    ("layers.attention.linear.kernels.kda_triton.chunk_kda", "kda:prompts"),
    (
        "layers.attention.linear.kernels.kda_triton.fused_sigmoid_gating_delta_rule_update",
        "kda:tokens",
    ),
    ("models.qwen3_next.fused_qkvzba_split_reshape_cat", "gdn:split"),
    ("models.qwen3_next.FusedRMSNormGated.forward", "gdn:gated_norm"),
    ("models.qwen2_moe.fused_gate_sigmoid_mul", "gdn:gated_expert"),
    ("models.qwen2_moe.fused_gate_sigmoid_mul_add", "gdn:add_gated_expert"),
)
RECURRENT_LAYERS = tuple(
    Hook(target, "replace", _RECURRENT + hook, "recurrent layers; without: a triton kernel")
    for target, hook in _OF_RECURRENT_LAYERS
)
