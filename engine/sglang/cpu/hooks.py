"""What SGLang lacks on a machine without a GPU: functions of it that call us, and what fails
without. (Other fixes are the assignments of :mod:`engine.sglang.cpu.platform`.)"""

from __future__ import annotations

from engine.sglang.border import Hook

_GROUP = "distributed.parallel_state.GroupCoordinator."
_STAGING = "disaggregation.common."
_FIXES = "engine.sglang.cpu.fixes:"
_STAGING_FIXES = "engine.sglang.cpu.staging:"
_GROUP_FIXES = "engine.sglang.cpu.attention_groups:"

EVERY_ENGINE = (
    Hook(
        "mem_cache.pool_host.base.HostKVCache.__init__",
        "before",
        _FIXES + "before_host_pool",
        'without: any host KV pool dies at start in `_cuda_host_register` ("Torch not compiled '
        "with CUDA enabled\"): a decode engine's retraction backup, or HiCache",
    ),
    Hook(
        "layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_extend",
        "replace",
        _FIXES + "attention_of_new_tokens",
        "without (speed only): the attention of prefix and new queries is computed and the prefix "
        "rows are thrown away, so a cache hit saves none: 32 new tokens after 3968 cached ones "
        "take 0.78 s instead of 0.04 s",
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
