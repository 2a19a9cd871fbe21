"""Attention over what the indexer has chosen, and the ways of SGLang that lead to it."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.arg_groups import overrides
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from engine.sglang.border import Use
from engine.sglang.cpu.spans import spans
from engine.sglang.cpu.sparse.indexer import FP8_MAX
from engine.sglang.kv_pool import numbers_of

_BACKEND = "layers.attention.torch_native_backend.TorchNativeAttnBackend"
_LAYER = "layers.radix_attention.RadixAttention."
_OVERRIDES = "arg_groups.overrides."
USES = (
    Use("layers.attention.attention_registry.ATTENTION_BACKENDS", "given ours as `dsa`"),
    Use(_BACKEND, "what ours is but for its forwards"),
    Use(_BACKEND + ".token_to_kv_pool", "the pool"),
    Use("mem_cache.memory_pool.MLATokenToKVPool.set_mla_kv_buffer", "write new latents"),
    Use("mem_cache.memory_pool.MLATokenToKVPool.get_key_buffer", "read latents"),
    Use(_LAYER + "tp_q_head_num", "query heads at this rank"),
    Use(_LAYER + "v_head_dim", "numbers of a latent without those with a position"),
    Use(_LAYER + "scaling", "of the scores"),
    Use(_LAYER + "layer_id", "which layer it is"),
    Use("model_executor.forward_batch_info.ForwardBatch.out_cache_loc", "where new latents go"),
    Use(_OVERRIDES + "_dsa_kv_cache_dtype_default", "passed over: CUDA's types of KV"),
    Use(_OVERRIDES + "_dsa_split_backend_resolution", "passed over: CUDA's kernels"),
)


class SparseAttention(TorchNativeAttnBackend):
    """Absorbed MLA: query rows attend to ``topk_indices`` (positions, -1 for none)."""

    use_mha = False

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        q_rope: torch.Tensor | None = None,
        k_rope: torch.Tensor | None = None,
        topk_indices: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """As SGLang calls it, for prompts and for single tokens."""
        if save_kv_cache:
            self.token_to_kv_pool.set_mla_kv_buffer(layer, forward_batch.out_cache_loc, k, k_rope)
        heads, rank = layer.tp_q_head_num, layer.v_head_dim
        q_rope = q_rope if q_rope is not None else q[..., :0]
        queries = torch.cat([q.view(-1, heads, rank), q_rope.view(len(q), heads, -1)], -1)
        out = torch.empty(len(q), heads, rank, dtype=queries.dtype)
        table = self.req_to_token_pool.req_to_token
        latents = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        for span in spans(forward_batch):
            kv = latents[table[span.table_row, : span.total].long()]
            kv = numbers_of(self.token_to_kv_pool, kv)
            scores = torch.einsum("nhd,td->nht", queries[span.rows].float(), kv) * layer.scaling
            allowed = span.causal
            if topk_indices is not None:
                allowed &= _picked(topk_indices[span.rows].long(), span.total)
            scores.masked_fill_(~allowed[:, None], float("-inf"))
            # Nothing times a page that nobody has written (NaN) is NaN.
            kv = torch.where(allowed.any(0)[:, None], kv, 0)
            out[span.rows] = torch.einsum("nht,td->nhd", scores.softmax(-1), kv[:, :rank])
        return out.view(len(q), heads * rank)

    forward_decode = forward_extend


def _picked(positions: torch.Tensor, total: int) -> torch.Tensor:
    picked = torch.zeros(len(positions), total + 1, dtype=torch.bool)
    picked.scatter_(1, torch.where(positions < 0, total, positions), True)
    return picked[:, :total]


def write_latents(
    kv_buffer: torch.Tensor,
    loc: torch.Tensor,
    cache_k_nope: torch.Tensor,
    cache_k_rope: torch.Tensor,
    reserved_skip_index: int = 0,
) -> None:
    """For ``set_mla_kv_buffer_triton``."""
    rows = [part.reshape(len(loc), -1) for part in (cache_k_nope, cache_k_rope)]
    kv_buffer[loc, 0] = torch.cat(rows, -1)


def quantized_latents(
    k_nope: torch.Tensor, k_rope: torch.Tensor, tile_size: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """For ``quantize_k_cache_separate``: of new latents, shape (n, [1,] numbers), rows of FlashMLA,
    as bytes, without and with a position (:func:`engine.sglang.kv_pool.numbers_of` undoes it)."""
    grouped = k_nope.reshape(len(k_nope), -1, tile_size).float()
    scales = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-4) / FP8_MAX
    numbers = (grouped / scales).to(torch.float8_e4m3fn)
    rows = [part.reshape(len(k_nope), -1).view(torch.uint8) for part in (numbers, scales)]
    positions = k_rope.reshape(len(k_nope), -1).to(torch.bfloat16)
    return torch.cat(rows, -1), positions.view(torch.uint8)


def around_post_process(original: Any, args: Any, run: Any, *more: Any, **named: Any) -> Any:
    """AROUND ``run_post_process_pass``: a pass over SGLang's flags."""
    if run in (overrides._dsa_kv_cache_dtype_default, overrides._dsa_split_backend_resolution):
        return None
    return original(args, run, *more, **named)


def offer() -> None:
    """Also on what the hooks do not reach."""
    ATTENTION_BACKENDS["dsa"] = SparseAttention
    if not torch.cuda.is_available():
        torch.cuda.get_device_capability = lambda device=None: (0, 0)
