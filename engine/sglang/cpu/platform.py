"""SGLang on a machine without a GPU: the reference platform that tests run on.

Chosen with ``SGLANG_PLATFORM=dualpath_cpu``; on CUDA nothing in this file is active.
Stock SGLang 0.5.23 runs a single process on torch's CPU ops, but its P/D path assumes
CUDA in a few places; each fix below says what fails without it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from engine.config import CPU_GROUPS_VARIABLE
from engine.cpu import malloc as cpu_malloc

NAME = "dualpath_cpu"

log = logging.getLogger(__name__)


class DualPathCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU with torch's native attention and no pinned memory."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False


def activate() -> str | None:
    """Entry point of group ``sglang.srt.platforms``: None leaves SGLang its own choice."""
    return "engine.sglang.cpu.platform.DualPathCpuPlatform" if is_active() else None


def is_active() -> bool:
    """True in processes that were started on this platform."""
    return os.environ.get("SGLANG_PLATFORM") == NAME


def register_fixes() -> None:
    """Hook every fix into this process."""
    # Without (speed only): 100,000 page faults a forward in some engines, 20,000 in others.
    cpu_malloc.keep_freed_memory()
    _host_pools_without_pinning()
    _kv_sender_without_pinned_indices()
    _cpu_events_for_cuda_events()
    _hicache_direct_copy()
    _attention_of_new_tokens_only()
    _no_spinning_while_waiting()
    _children_are_forked()
    _mla_on_torch_native()
    _staging_between_unlike_sizes()
    _dp_attention()


def _host_pools_without_pinning() -> None:
    # Without: any host KV pool dies at start in _cuda_host_register ("Torch not compiled
    # with CUDA enabled"): a decode engine's retraction backup, or HiCache.
    HookRegistry.register(
        "sglang.srt.mem_cache.pool_host.base.HostKVCache.__init__",
        lambda self, *args, **kwargs: ((self, *args), {**kwargs, "pin_memory": False}),
        HookType.BEFORE,
    )


def _kv_sender_without_pinned_indices() -> None:
    # Without: the first P -> D send allocates page indices with pin_memory=True and the
    # prefill engine dies.
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

    MooncakeKVSender.supports_host_tensor_indices = False


def _cpu_events_for_cuda_events() -> None:
    # Without: the early send of a cached prefix (disaggregation/prefill.py,
    # maybe_send_cached_prefix_chunk) creates a torch.cuda.Event and the prefill engine
    # dies at the second, cached, request.
    torch.cuda.Event = torch.cpu.Event
    torch.cuda.current_stream = torch.cpu.current_stream


def _hicache_direct_copy() -> None:
    # Without: SGLang's own HiCache (a baseline to compare with) raises NameError, since
    # transfer_kv_direct comes from sgl_kernel, which has no CPU build.
    from sglang.srt.mem_cache.pool_host import mha

    mha.transfer_kv_direct = _transfer_kv_direct


def _transfer_kv_direct(
    src_layers: list[torch.Tensor],
    dst_layers: list[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    source = src_indices.to("cpu", torch.int64)
    target = dst_indices.to("cpu", torch.int64)
    for src, dst in zip(src_layers, dst_layers, strict=True):
        dst.index_copy_(0, target, src.index_select(0, source))


def _attention_of_new_tokens_only() -> None:
    # Without (speed only): torch_native computes the attention of prefix and new queries
    # and throws the prefix rows away, so a cache hit saves no attention: 32 new tokens
    # after 3968 cached ones take 0.78 s instead of 0.04 s.
    HookRegistry.register(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
        "._run_sdpa_forward_extend",
        _sdpa_extend,
        HookType.REPLACE,
    )


def _sdpa_extend(
    self: Any,
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_prefix_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    scaling: float | None = None,
    enable_gqa: bool = False,
    causal: bool = False,
    is_cross_attn: bool = False,
    sliding_window_size: int | None = None,
) -> torch.Tensor:
    """Attention of each request's new tokens over prefix and new keys.

    query, output: [new tokens of the batch, heads, head_dim]; caches: [rows, kv heads,
    head_dim]. The causal mask is aligned to the lower right.
    """
    if encoder_lens is not None or (sliding_window_size or -1) > -1:
        raise NotImplementedError("cross attention and sliding windows: use a GPU backend")
    start = 0
    for i in range(seq_lens.shape[0]):
        new, prefix = int(extend_seq_lens[i]), int(extend_prefix_lens[i])
        total = int(seq_lens[i])
        rows = req_to_token[req_pool_indices[i], :total]
        q = query[start : start + new].movedim(0, 1)[None]
        k = k_cache[rows].movedim(0, 1)[None].to(q.dtype)
        v = v_cache[rows].movedim(0, 1)[None].to(q.dtype)
        needs_mask = causal and prefix > 0
        mask = torch.ones(new, total, dtype=torch.bool).tril(prefix) if needs_mask else None
        attended = torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            enable_gqa=enable_gqa,
            scale=scaling,
            is_causal=causal and prefix == 0,
        )
        output[start : start + new] = attended[0].movedim(0, 1)
        start += new
    return output


def _has_groups() -> bool:
    """Whether this engine has attention groups."""
    return os.environ.get(CPU_GROUPS_VARIABLE) == "1"


def _no_spinning_while_waiting() -> None:
    # Without (speed only): a scheduler that waits for a transfer or a peer, so is neither
    # idle nor busy, spins at 100 % of a core even with --sleep-on-idle; with many engines
    # on few cores the waiting ones starve the one that computes.
    has_groups = _has_groups()  # which do not sleep on idle

    def after_on_idle(result: Any, scheduler: Any) -> None:
        if has_groups or not scheduler.is_fully_idle():
            time.sleep(0.002)

    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.on_idle", after_on_idle, HookType.AFTER
    )


def _children_are_forked() -> None:
    # Without (speed and memory only): SGLang spawns its schedulers and its detokenizer, and
    # each imports SGLang, torch and transformers anew: 7 s of a core and 0.4 GB apiece.
    HookRegistry.register(
        "sglang.srt.entrypoints.engine._set_envs_and_config", _fork_from_now_on, HookType.AFTER
    )


def _fork_from_now_on(result: Any, *args: Any) -> None:
    # A thread does not survive a fork, but what it has locked stays so. Schedulers of attention
    # groups are started by a process that has threads.
    if _has_groups():
        return
    if len(os.listdir("/proc/self/task")) == 1:
        multiprocessing.set_start_method("fork", force=True)
    else:
        log.warning("threads have started: SGLang's processes are spawned, which takes longer")


def _mla_on_torch_native() -> None:
    # Without: DeepSeek-style MLA takes triton's route for an unknown backend, whose first
    # extend never writes the latent pool: tokens are silently wrong.
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
        AttnForwardMethod,
    )

    AttentionBackendRegistry.register(
        "torch_native", lambda attention, batch: AttnForwardMethod.MLA
    )
    # Without: get_rope_cpu knows only deepseek_yarn and raises for plain rotary embeddings.
    HookRegistry.register(
        "sglang.srt.layers.rotary_embedding.factory.get_rope_cpu", _rope, HookType.AROUND
    )


def _staging_between_unlike_sizes() -> None:
    if os.environ.get("SGLANG_DISAGG_STAGING_BUFFER") == "1":
        from engine.sglang.cpu import staging as cpu_staging

        cpu_staging.register_fixes()


def _dp_attention() -> None:
    if _has_groups():
        from engine.sglang.cpu import attention_groups as cpu_attention_groups

        cpu_attention_groups.register_fixes()


def _rope(
    original: Any,
    head_size: int,
    rotary_dim: int,
    max_position: int,
    base: float,
    is_neox_style: bool = True,
    rope_scaling: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    partial_rotary_factor: float = 1.0,
    device: str | None = None,
) -> Any:
    from sglang.srt.layers.rotary_embedding.factory import get_rope

    shape = (head_size, rotary_dim, max_position, base, is_neox_style, rope_scaling)
    if rope_scaling is None:
        return get_rope(*shape, dtype, partial_rotary_factor)
    return original(*shape, dtype, partial_rotary_factor, device)
