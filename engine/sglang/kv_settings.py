"""SGLang's flags that count for KV: engines that differ in one of them exchange none.

All count but those of :data:`NEUTRAL`, so that a flag that a newer SGLang brings counts until
somebody has thought about it. A flag counts as given, not as SGLang has resolved it: "auto"
means one thing for a model, on whatever machine. Only values that differ from SGLang's
defaults are noted, so that a new flag that nobody uses changes no namespace.

What the roles of one cluster give differently has to be neutral, or no pair would form: how
much memory, which ranks, which kernels for the same numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from engine.model_digest import contents_digest
from engine.sglang.border import Use

_ARGS = "server_args.ServerArgs."
VALUE_CHARS_MAX = 200
"""A longer value is noted by its digest."""

NEUTRAL = {
    "what the namespace has by other fields: the model, its version, the layout": """
        model_path revision weight_version dtype kv_cache_dtype page_size""",
    "where an engine listens, and how it is reached": """
        host port fastapi_root_path smg_grpc_mode grpc_mode grpc_port grpc_worker_threads
        sidecar sidecar_args skip_server_warmup warmups enable_http2
        http2_max_concurrent_streams http2_initial_connection_window_size ssl_keyfile
        ssl_certfile ssl_ca_certs ssl_keyfile_password enable_ssl_refresh api_key admin_api_key
        grpc_response_timeout_secs enable_http_worker_reuseport engine_info_bootstrap_port""",
    "between text and token ids, which name the KV": """
        tokenizer_path tokenizer_mode tokenizer_backend tokenizer_worker_num
        detokenizer_worker_num skip_tokenizer_init served_model_name chat_template
        trust_request_chat_template hf_chat_template_name completion_template file_storage_path
        enable_cache_report return_input_ids return_output_ids reasoning_parser
        default_chat_template_kwargs strip_thinking_cache enable_strict_thinking
        tool_call_parser tool_server asr_max_buffer_seconds asr_max_concurrent_sessions
        allow_auto_truncate stream_interval batch_notify_size
        stream_response_default_include_usage incremental_streaming_output
        enable_streaming_session enable_dynamic_batch_tokenizer
        dynamic_batch_tokenizer_batch_size dynamic_batch_tokenizer_batch_timeout
        enable_tokenizer_batch_encode disable_tokenizer_batch_decode enable_response_store""",
    "behind the last layer: which token follows, and what is told of it": """
        random_seed sampling_defaults preferred_sampling_params sampling_backend
        grammar_backend constrained_json_whitespace_pattern
        constrained_json_disable_any_whitespace constrained_json_max_whitespace_cnt
        mlx_enable_sampling enable_fp32_lm_head enable_custom_logit_processor
        enable_return_hidden_states return_hidden_states_mode enable_return_routed_experts
        enable_return_indexer_topk enable_return_aux_hidden_states aux_hidden_state_capture
        return_aux_hidden_state_layer_ids sampling_mask_max_tokens disable_outlines_disk_cache
        enable_watermark watermark_config watermark_key watermark_key_b
        watermark_context_window watermark_mixing_probability watermark_max_probability
        watermark_default_enabled watermark_enforce_all""",
    "how the same weights are brought into memory, and kept there": """
        trust_remote_code download_dir model_checksum modelopt_checkpoint_save_path
        modelopt_export_path startup_weight_load_mode weight_loader_disable_mmap
        weight_loader_prefetch_checkpoints weight_loader_prefetch_num_threads
        weight_loader_drop_cache_after_load delete_ckpt_after_loading weight_cache_timeout
        checkpoint_engine_wait_weights_before_ready enable_memory_saver
        enable_weights_cpu_backup enable_draft_weights_cpu_backup cpu_offload_gb
        offload_group_size offload_num_in_group offload_prefetch_step offload_mode
        ple_offload_embedding ple_offload_backend ple_offload_dir""",
    "which requests run together, and how many": """
        mem_fraction_static max_running_requests max_queued_requests max_total_tokens
        chunked_prefill_size prefill_decode_interval prefill_decode_interval_min_bs
        enable_dynamic_chunking max_prefill_tokens prefill_max_requests schedule_policy
        enable_priority_scheduling disable_priority_preemption default_priority_value
        abort_on_priority_when_disabled schedule_low_priority_values_first
        priority_scheduling_preemption_threshold retraction_policy schedule_conservativeness
        disable_chunked_prefix_cache disable_overlap_schedule num_continuous_decode_steps
        scheduler_recv_interval enable_mixed_chunk enable_prefill_delayer
        prefill_delayer_max_delay_passes prefill_delayer_token_usage_low_watermark
        prefill_delayer_forward_passes_buckets prefill_delayer_wait_seconds_buckets
        prefill_delayer_queue_min_ratio prefill_delayer_max_delay_ms min_free_slots_delay
        enable_two_batch_overlap enable_single_batch_overlap tbo_token_distribution_threshold
        max_loaded_loras max_loras_per_batch lora_eviction_policy lora_backend
        max_lora_chunk_size enable_lora_overlap_loading lora_drain_wait_threshold""",
    "an engine's own caches of KV that it has computed": """
        radix_eviction_policy radix_eviction_policy_config disable_radix_cache
        enable_session_radix_cache radix_cache_backend _radix_eviction_policy_explicitly_set
        enable_hierarchical_cache hicache_host_memory_mode hicache_ratio hicache_size
        hicache_write_policy hicache_io_backend hicache_mem_layout
        hicache_storage_prefetch_policy hicache_storage_prefetch_retry_poll_interval
        hicache_storage_prefetch_retry_max_attempts hicache_host_memory_fraction
        enable_unified_cache_external_linker unified_cache_external_linker_backend
        unified_cache_external_linker_config enable_linker_mla_dedup max_mamba_cache_size
        mamba_full_memory_ratio mamba_track_interval mamba_max_states_per_path""",
    "which processes and ranks share the work; P and D often differ": """
        nccl_port dist_timeout dist_init_addr gated_launch_port nnodes node_rank tp_size pp_size
        pp_max_micro_batch_size pp_async_batch_depth dp_size attn_dp_size load_balance_method
        attn_cp_size moe_dp_size dwdp_size enable_dp_attention
        enable_dp_attention_local_control_broadcast enable_dp_lm_head
        enable_tp_lm_head_all_to_all enable_attn_tp_input_scattered
        enable_shared_experts_attn_tp shared_experts_tp_size enable_dense_mlp_attn_tp
        enable_layernorm_sp disable_attn_tp_gather enable_p2p_check ep_size moe_dense_tp_size
        ep_join_rank_offset elastic_ep_initial_size max_ep_size enable_cp_tp_group_sharing
        enable_megamoe_for_layernorm_sp enable_nccl_nvls enable_symm_mem
        disable_custom_all_reduce enable_mscclpp enable_torch_symm_mem pre_warm_nccl
        enable_flashinfer_allreduce_fusion enforce_disable_flashinfer_allreduce_fusion
        flashinfer_allreduce_fusion_backend enable_aiter_allreduce_fusion
        disable_aiter_allreduce_fusion_in_prefill disable_aiter_allreduce_fusion_in_decode""",
    "of which machine: the device, its threads and clocks": """
        device base_gpu_id gpu_id_step watchdog_timeout soft_watchdog_timeout sleep_on_idle
        use_ray custom_sigquit_handler numa_node gc_threshold""",
    "how P and D meet": """
        disaggregation_mode disaggregation_transfer_backend disaggregation_bootstrap_port
        disaggregation_ib_device disaggregation_decode_enable_radix_cache
        disaggregation_decode_enable_offload_kvcache disaggregation_decode_retraction_backup
        num_reserved_decode_tokens disaggregation_decode_extra_slots
        disaggregation_decode_polling_interval optimistic_prefill_attempts enable_pdmux
        pdmux_config_path sm_group_num disaggregation_enable_kv_checksum enable_pd_role_switch
        disaggregation_decode_host_receive_threshold disaggregation_decode_allocation_policy""",
    "kernels of the same function, which differ by rounding, as batches of other sizes do": """
        attention_backend decode_attention_backend prefill_attention_backend
        enable_lean_attention fp8_gemm_runner_backend fp4_gemm_runner_backend
        bf16_gemm_backend dsa_prefill_backend dsa_decode_backend dsv4_prefill_backend
        dsa_paged_mqa_logits_backend dsa_topk_backend dsv4_attn_backend
        disable_flashinfer_autotune flashinfer_autotune_skip_ops triton_attention_num_kv_splits
        triton_attention_split_tile_size flashinfer_mla_disable_ragged
        enable_fused_qk_norm_rope enable_amd_monokernel enable_nvidia_megakernel
        dsa_triton_union enable_dsa_fused_indexer enable_fused_moe_sum_all_reduce
        cuda_graph_config cuda_graph_backend_decode cuda_graph_backend_prefill
        cuda_graph_max_bs_decode cuda_graph_max_bs_prefill cuda_graph_bs_decode
        cuda_graph_bs_prefill cuda_graph_prefill_max_context disable_prefill_cuda_graph
        disable_decode_cuda_graph disable_cuda_graph disable_cuda_graph_padding
        enable_profile_cuda_graph enable_cudagraph_gc debug_cuda_graph enable_torch_compile
        enable_torch_compile_debug_mode torch_compile_max_bs cuda_graph_max_seq_len_prefill""",
    "where the experts of a model are, and how they are reached; P and D often differ": """
        moe_a2a_backend moe_runner_backend deepep_v2_mode deepep_mode fuseep_mode deepep_config
        ep_num_redundant_experts ep_dispatch_algorithm init_expert_location enable_eplb
        eplb_algorithm eplb_rebalance_num_iterations eplb_rebalance_layers_per_chunk
        eplb_min_rebalancing_utilization_threshold expert_distribution_recorder_mode
        expert_distribution_recorder_buffer_size expert_balancedness_report_mode
        elastic_ep_backend enable_elastic_expert_backup mooncake_ib_device enable_waterfill
        ep_join_mode elastic_ep_scale_timeout disable_shared_experts_fusion
        enforce_shared_experts_fusion flashinfer_a2a_dispatch_type kt_cpuinfer
        kt_threadpool_count kt_num_gpu_experts enable_paged_experts
        paged_experts_num_resident""",
    "how images reach the engine": """
        enable_broadcast_mm_inputs_process enable_prefix_mm_cache mm_enable_dp_encoder
        mm_processor_worker_num mm_io_worker_num allowed_media_domains
        media_url_max_file_size_mb mm_preprocess_cache_size_mb limit_mm_data_per_request
        mm_feature_transport encoder_transfer_backend encoder_urls encoder_bootstrap_port
        encoder_register_urls enable_adaptive_dispatch_to_encoder""",
    "what is logged, counted and dumped": """
        log_level log_level_http log_requests log_requests_level log_requests_format
        log_requests_target uvicorn_access_log_exclude_prefixes crash_dump_folder
        show_time_cost enable_metrics smg_http_sidecar_port enable_mfu_metrics
        enable_metrics_for_all_schedulers load_snapshot_publish_interval
        tokenizer_metrics_custom_labels_header tokenizer_metrics_allowed_custom_labels
        extra_metric_labels bucket_time_to_first_token bucket_inter_token_latency
        bucket_e2e_request_latency prompt_tokens_buckets generation_tokens_buckets
        gc_warning_threshold_secs decode_log_interval enable_request_time_stats_logging
        kv_events_config load_publish_endpoint enable_forward_pass_metrics
        forward_pass_metrics_worker_id forward_pass_metrics_ipc_name enable_trace trace_modules
        otlp_traces_endpoint otlp_service_name export_metrics_to_file
        export_metrics_to_file_dir stat_loggers debug_tensor_dump_output_folder
        debug_tensor_dump_layers enable_layerwise_nvtx_marker""",
}
"""Flags that change no KV of equal token ids under an equal layout, by the reason."""

BY_CONTENTS = frozenset(
    """quantization_param_path lora_paths uno_lora_path decrypted_config_file kt_weight_path
    modelopt_checkpoint_restore_path speculative_draft_model_path speculative_token_map""".split()
)
"""Flags with the paths of files or folders, whose bytes count instead of their names."""

BY_JSON = frozenset(("json_model_override_args", "model_loader_extra_config"))
"""Flags with JSON, in which neither order nor blanks count."""

NO_FORMAT: Mapping[str, str] = MappingProxyType({})

_neutral = frozenset(name for names in NEUTRAL.values() for name in names.split())

USES = (
    Use("server_args.ServerArgs", "every flag counts for KV, but for those of NEUTRAL"),
    *(Use(_ARGS + name, "counts by the contents of files") for name in sorted(BY_CONTENTS)),
    *(Use(_ARGS + name, "counts without order and blanks") for name in sorted(BY_JSON)),
)


def kv_settings(args: Any, dtype: str, kv_format: Mapping[str, str] = NO_FORMAT) -> str:
    """JSON of the flags that count, with sorted names: those that are not as SGLang has them by
    default, and always the type in which the model computes. ``args``: as they were given.
    ``kv_format``: what no flag says (:func:`engine.sglang.kv_pool.kv_format`)."""
    counted: dict[str, object] = {"dtype": dtype, **kv_format}
    defaults = type(args)(model_path="")
    for name in type(args).__struct_fields__:
        value = getattr(args, name)
        if name not in _neutral and value != getattr(defaults, name):
            counted[name] = _noted(name, value)
    return json.dumps(counted, sort_keys=True)


def _noted(name: str, value: object) -> object:
    if name in BY_JSON and isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            pass  # SGLang's to refuse
    if name in BY_CONTENTS:
        value = _by_contents(value)
    text = json.dumps(msgspec.to_builtins(value, enc_hook=str), sort_keys=True)
    if len(text) > VALUE_CHARS_MAX:
        return f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"
    return json.loads(text)


def _by_contents(value: object) -> object:
    """With each path replaced by a digest of what lies there; also in "name=path"."""
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, dict):
        return {key: _by_contents(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_by_contents(item) for item in value]
    if not isinstance(value, str):
        return value
    name, equals, path = value.rpartition("=")
    here = Path(path)
    return name + equals + contents_digest(here) if path and here.exists() else value
