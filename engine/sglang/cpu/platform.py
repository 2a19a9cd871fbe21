"""SGLang on a machine without a GPU: the reference platform that tests run on.

Chosen with ``SGLANG_PLATFORM=dualpath_cpu``; on CUDA nothing in this folder is active.
Stock SGLang 0.5.23 runs a single process on torch's CPU ops, but its P/D path assumes
CUDA in a few places; each fix, here and in :mod:`engine.sglang.cpu.hooks`, says what fails
without it.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from engine.config import (
    CPU_COMPRESSED_VARIABLE,
    CPU_DRAFT_VARIABLE,
    CPU_RECURRENT_VARIABLE,
    CPU_SPARSE_VARIABLE,
)
from engine.cpu import malloc as cpu_malloc
from engine.sglang.border import Use, install
from engine.sglang.cpu import hooks

NAME = "dualpath_cpu"

USES = (
    Use("platforms.interface.SRTPlatform", "a platform"),
    Use("platforms.interface.SRTPlatform.get_default_attention_backend", "torch's own attention"),
    Use("platforms.interface.SRTPlatform.is_pin_memory_available", "there is none"),
    Use("platforms.interface.SRTPlatform.supports_speculative_algorithm", "EAGLE, and so MTP"),
    Use(
        "platforms.interface.SRTPlatform.support_mamba_cache_extra_buffer",
        "without: recurrent layers are refused with pages of 64 tokens",
    ),
    Use("platforms.interface.SRTPlatform.capabilities", "none of a GPU's"),
    Use("platforms.interface.PlatformCapabilities", "their type"),
    Use("platforms.cpu.CpuDeviceMixin", "the rest of SGLang's own CPU platform"),
    Use("platforms.device_mixin.PlatformEnum.OOT", "a platform of a plugin's"),
    Use(
        "disaggregation.mooncake.conn.MooncakeKVSender.supports_host_tensor_indices",
        "set to False; without: the first P -> D send allocates page indices in pinned memory and "
        "the prefill engine dies",
    ),
    Use(
        "mem_cache.pool_host.mha",
        "given a `transfer_kv_direct`; without: SGLang's own HiCache (a baseline to compare with) "
        "raises NameError, since sgl_kernel has no CPU build",
    ),
    Use(
        "models.deepseek_common.attention_backend_handler.AttentionBackendRegistry.register",
        "without: DeepSeek-style MLA takes triton's route for an unknown backend, whose first "
        "extend never writes the latent pool: tokens are silently wrong",
    ),
    Use(
        "models.deepseek_common.attention_backend_handler.AttnForwardMethod.MLA",
        "the route that torch's own attention can go",
    ),
)


class DualPathCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU with torch's native attention and no pinned memory."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm == "EAGLE"

    def support_mamba_cache_extra_buffer(self) -> bool:
        return True


def activate() -> str | None:
    """Entry point of group ``sglang.srt.platforms``: None leaves SGLang its own choice."""
    return "engine.sglang.cpu.platform.DualPathCpuPlatform" if is_active() else None


def is_active() -> bool:
    """True in processes that were started on this platform."""
    return os.environ.get("SGLANG_PLATFORM") == NAME


def _has(variable: str) -> bool:
    """Whether the launcher says so of this engine's model."""
    return os.environ.get(variable) == "1"


def register_fixes() -> None:
    """Make every fix in this process."""
    from engine.sglang.cpu import fixes, staging

    # Without (speed only): 100,000 page faults a forward in some engines, 20,000 in others.
    cpu_malloc.keep_freed_memory()
    _kv_sender_without_pinned_indices()
    _cpu_events_for_cuda_events()
    _hicache_direct_copy()
    _mla_on_torch_native()
    install(hooks.EVERY_ENGINE)
    if os.environ.get("SGLANG_DISAGG_STAGING_BUFFER") == "1":
        staging.let_a_cpu_stage()
        install(hooks.UNLIKE_SIZES)
    if fixes.has_groups():
        install(hooks.ATTENTION_GROUPS)
    if _has(CPU_RECURRENT_VARIABLE):
        from engine.sglang.cpu.recurrent import conv

        conv.offer()
        install(hooks.RECURRENT_LAYERS)
    if _has(CPU_SPARSE_VARIABLE):
        from engine.sglang.cpu.sparse import attention

        attention.offer()
        install(hooks.SPARSE_ATTENTION)
    if _has(CPU_COMPRESSED_VARIABLE):
        from engine.sglang.cpu.compressed import attention as compressed_attention

        compressed_attention.offer()
        install(hooks.COMPRESSED_ATTENTION)
    if _has(CPU_DRAFT_VARIABLE):
        from engine.sglang.cpu import speculative

        speculative.offer()
        install(hooks.DRAFT)


def _kv_sender_without_pinned_indices() -> None:
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

    MooncakeKVSender.supports_host_tensor_indices = False


def _cpu_events_for_cuda_events() -> None:
    # Without: the early send of a cached prefix (disaggregation/prefill.py,
    # maybe_send_cached_prefix_chunk) creates a torch.cuda.Event and the prefill engine
    # dies at the second, cached, request.
    torch.cuda.Event = torch.cpu.Event
    torch.cuda.current_stream = torch.cpu.current_stream


def _hicache_direct_copy() -> None:
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


def _mla_on_torch_native() -> None:
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
        AttnForwardMethod,
    )

    AttentionBackendRegistry.register(
        "torch_native", lambda attention, batch: AttnForwardMethod.MLA
    )
