"""What :mod:`engine.sglang.cpu.hooks` has every engine on a CPU do otherwise."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import time
import zlib
from functools import cache
from typing import Any

import torch

from engine.config import CPU_GROUPS_VARIABLE
from engine.sglang.border import Use

log = logging.getLogger(__name__)

USES = (
    Use("layers.rotary_embedding.factory.get_rope", "what makes plain rotary embeddings"),
    Use("disaggregation.checksum.KvChecksumComputer._kv_data_ptrs", "buffers that are digested"),
    Use("disaggregation.checksum.KvChecksumComputer._kv_item_lens", "bytes of a page in each"),
    Use("managers.scheduler.Scheduler.is_fully_idle", "a scheduler that sleeps by itself"),
)


@cache
def has_groups() -> bool:
    """Whether this engine has attention groups."""
    return os.environ.get(CPU_GROUPS_VARIABLE) == "1"


def before_host_pool(
    pool: Any, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """BEFORE ``HostKVCache.__init__``: no pinned memory."""
    return (pool, *args), {**kwargs, "pin_memory": False}


def attention_of_new_tokens(
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
    """For ``TorchNativeAttnBackend._run_sdpa_forward_extend``: attention of each request's new
    tokens over prefix and new keys.

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


def after_on_idle(result: Any, scheduler: Any) -> None:
    """AFTER ``Scheduler.on_idle``. Schedulers of groups do not sleep on idle."""
    if has_groups() or not scheduler.is_fully_idle():
        time.sleep(0.002)


def fork_from_now_on(result: Any, *_: Any, **__: Any) -> None:
    """AFTER ``_set_envs_and_config``."""
    # A thread does not survive a fork, but what it has locked stays so.
    if len(os.listdir("/proc/self/task")) == 1:
        multiprocessing.set_start_method("fork", force=True)
    else:
        log.warning("threads have started: SGLang's processes are spawned, which takes longer")


def around_rope(
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
    """AROUND ``get_rope_cpu``."""
    # Not at the top: SGLang's plugins are loaded before its modules.
    from sglang.srt.layers.rotary_embedding.factory import get_rope

    shape = (head_size, rotary_dim, max_position, base, is_neox_style, rope_scaling)
    if rope_scaling is None:
        return get_rope(*shape, dtype, partial_rotary_factor)
    return original(*shape, dtype, partial_rotary_factor, device)


def digest_of_pages(
    computer: Any, kv_page_indices_gpu: torch.Tensor, state_indices_gpu: object = None
) -> int:
    """INSTEAD OF ``KvChecksumComputer.compute``: Adler-32 of pages, buffer by buffer. P and D
    have as many of the same length, in the same order."""
    pages, digest = kv_page_indices_gpu.tolist(), 1
    for base, length in zip(computer._kv_data_ptrs, computer._kv_item_lens, strict=True):
        for page in pages:
            content = (ctypes.c_char * length).from_address(base + page * length)
            digest = zlib.adler32(content, digest)
    return digest
