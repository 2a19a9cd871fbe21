"""The indexer: each new token's choice of the tokens before it, by keys of 128 float8 numbers.

The pool's bytes are those of CUDA: a page is the keys of its tokens, then a float32 scale each.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from engine.sglang.border import Use
from engine.sglang.cpu.spans import spans

_INDEXER = "layers.attention.dsa.dsa_indexer.Indexer."
_DSA = "mem_cache.memory_pool.DSATokenToKVPool."
_BATCH = "model_executor.forward_batch_info.ForwardBatch."
USES = (
    Use(_INDEXER + "wq_b", "queries"),
    Use(_INDEXER + "wk", "keys"),
    Use(_INDEXER + "k_norm", "their norm"),
    Use(_INDEXER + "weights_proj", "how much each head counts"),
    Use(_INDEXER + "rotary_emb", "positions"),
    Use(_INDEXER + "n_heads", "heads of queries"),
    Use(_INDEXER + "head_dim", "numbers of a key"),
    Use(_INDEXER + "rope_head_dim", "those with a position"),
    Use(_INDEXER + "softmax_scale", "of the scores"),
    Use(_INDEXER + "index_topk", "tokens to be chosen"),
    Use(_INDEXER + "_maybe_rotate", "as SGLang does where no fused kernel is"),
    Use(_DSA + "set_index_k_scale_buffer", "write keys"),
    Use(_DSA + "get_index_k_with_scale_buffer", "read them; waits for the layer's delivery"),
    Use("mem_cache.index_key_cache.IndexKeyCache.buffer", "the keys' memory, by layer"),
    Use("mem_cache.index_key_cache.IndexKeyCache.pool", "the pool that has it"),
    Use(_DSA + "start_layer", "the first of those layers"),
    Use("model_executor.forward_context.get_token_to_kv_pool", "the pool"),
    Use("model_executor.forward_context.get_attn_backend", "has the table"),
    Use(
        "layers.attention.torch_native_backend.TorchNativeAttnBackend.req_to_token_pool",
        "the table",
    ),
    Use("mem_cache.memory_pool.ReqToTokenPool.req_to_token", "rows of the pool by position"),
    Use(_BATCH + "out_cache_loc", "rows of the pool for the new tokens"),
)
FP8_MAX = 448.0
KEY = 128
SCALE_BYTES = 4


def choose(
    indexer: Any,
    x: torch.Tensor,
    q_lora: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: Any,
    layer_id: int,
    return_indices: bool = True,
    **_: Any,
) -> torch.Tensor | None:
    """For ``Indexer.forward_native``: keep the new tokens' keys; then for each new token the
    positions that it is to attend to in its own request, shape (tokens, index_topk), -1 for none.
    """
    from sglang.srt.model_executor.forward_context import get_attn_backend, get_token_to_kv_pool

    pool = get_token_to_kv_pool()
    queries, keys = _queries_and_keys(indexer, x, q_lora, positions)
    pool.set_index_k_scale_buffer(layer_id, forward_batch.out_cache_loc, *quantized(keys))
    if not return_indices:
        return None
    weights = indexer.weights_proj(x.to(torch.bfloat16))[0].float()  # as SGLang keeps them
    weights = weights * indexer.n_heads**-0.5 * indexer.softmax_scale
    buffer = pool.get_index_k_with_scale_buffer(layer_id)
    table = get_attn_backend().req_to_token_pool.req_to_token
    chosen = torch.full((len(x), indexer.index_topk), -1, dtype=torch.int32)
    for span in spans(forward_batch):
        of_request = read_keys(buffer, table[span.table_row, : span.total].long())
        scores = torch.einsum("nhd,td->nht", queries[span.rows].float(), of_request).relu_()
        scores = torch.einsum("nht,nh->nt", scores, weights[span.rows])
        scores.masked_fill_(~span.causal, float("-inf"))
        top = scores.topk(min(indexer.index_topk, span.total), -1)
        positions_of = top.indices.int().masked_fill(top.values == float("-inf"), -1)
        chosen[span.rows, : positions_of.shape[1]] = positions_of
    return chosen


def _queries_and_keys(
    indexer: Any, x: torch.Tensor, q_lora: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rope = indexer.rope_head_dim
    query = indexer.wq_b(q_lora)[0].view(len(x), indexer.n_heads, indexer.head_dim)
    key = indexer.k_norm(indexer.wk(x)[0])
    q_rope, k_rope = indexer.rotary_emb(
        positions, query[..., :rope].contiguous(), key[..., :rope].contiguous()
    )
    query = torch.cat([q_rope.view(len(x), -1, rope), query[..., rope:]], -1)
    key = torch.cat([k_rope.view(len(x), rope), key[..., rope:]], -1)
    return indexer._maybe_rotate(query), indexer._maybe_rotate(key)


@cache
def _hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * size**-0.5


def rotated(x: torch.Tensor) -> torch.Tensor:
    """For ``rotate_activation``: the Hadamard transform of the last dimension."""
    return (x.float() @ _hadamard(x.shape[-1])).to(x.dtype)


def quantized(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of keys, shape (n, KEY): float8 numbers, and for each key a scale, a power of two."""
    largest = keys.float().abs().amax(-1, keepdim=True).clamp_min(1e-4)
    scales = torch.exp2(torch.ceil(torch.log2(largest / FP8_MAX)))
    return (keys.float() / scales).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales


def store(
    cache: Any, layer_id: int, loc: torch.Tensor, index_k: torch.Tensor, index_k_scale: torch.Tensor
) -> None:
    """For ``IndexKeyCache.store_quantized``."""
    keys, scales = _parts(cache.buffer[layer_id - cache.pool.start_layer])
    page, at = loc // keys.shape[1], loc % keys.shape[1]
    keys[page, at] = index_k.view(torch.uint8)
    scales[page, at] = index_k_scale.reshape(-1, 1).contiguous().view(torch.uint8)


def read_keys(buffer: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Of rows of the pool, shape (n, KEY)."""
    keys, scales = _parts(buffer)
    page, at = rows // keys.shape[1], rows % keys.shape[1]
    of_rows = keys[page, at].view(torch.float8_e4m3fn).float()
    return of_rows * scales[page, at].contiguous().view(torch.float32)


def _parts(buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and scales, as bytes: shape (pages, tokens of a page, bytes)."""
    tokens = buffer.shape[1] // (KEY + SCALE_BYTES)
    return (
        buffer[:, : tokens * KEY].view(len(buffer), tokens, KEY),
        buffer[:, tokens * KEY :].view(len(buffer), tokens, SCALE_BYTES),
    )
