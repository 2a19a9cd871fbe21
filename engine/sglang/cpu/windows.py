"""Attention with a sliding window or sinks, which torch's native backend of SGLang lacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from engine.sglang.border import Use
from engine.sglang.cpu.spans import Span, spans

_BACKEND = "layers.attention.torch_native_backend.TorchNativeAttnBackend."
_LAYER = "layers.radix_attention.RadixAttention."
_POOL = "mem_cache.swa_memory_pool.SWAKVPool."
USES = (
    Use(_BACKEND + "token_to_kv_pool", "the pool"),
    Use(_BACKEND + "req_to_token_pool", "the table"),
    Use("mem_cache.memory_pool.ReqToTokenPool.req_to_token", "rows of the pool by position"),
    Use(_BACKEND + "use_sliding_window_kv_pool", "layers with a window have a pool of their own"),
    Use(_BACKEND + "swa_out_cache_loc", "where new tokens go there"),
    Use(_POOL + "layers_mapping", "which layers those are"),
    Use(_POOL + "translate_loc_from_full_to_swa", "rows of that pool"),
    Use(_POOL + "set_kv_buffer", "write K and V of new tokens"),
    Use(_POOL + "get_key_buffer", "read K; waits for the layer's delivery"),
    Use(_POOL + "get_value_buffer", "read V"),
    Use("mem_cache.memory_pool.KVWriteLoc", "where new tokens go, in both pools"),
    Use("model_executor.forward_batch_info.ForwardBatch.out_cache_loc", "the same"),
    Use(_LAYER + "sliding_window_size", "how far back a token looks beside itself; -1: to all"),
    Use(_LAYER + "tp_q_head_num", "query heads at this rank"),
    Use(_LAYER + "qk_head_dim", "numbers of a head's query and key"),
    Use(_LAYER + "scaling", "of the scores"),
    Use(_LAYER + "layer_id", "which layer it is"),
)
PIECE_TOKENS_MIN = 64


def around_attention(
    original: Any,
    backend: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: Any,
    forward_batch: Any,
    save_kv_cache: bool = True,
    sinks: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """AROUND ``TorchNativeAttnBackend.forward_extend`` and ``forward_decode``. ``sinks``: for each
    head the score of a key without a value, to which every token attends (gpt-oss)."""
    window = layer.sliding_window_size
    has_window = window is not None and window > -1
    if sinks is None and not has_window:
        return original(backend, q, k, v, layer, forward_batch, save_kv_cache)
    if save_kv_cache:
        _write(backend, layer, forward_batch, k, v)
    pool = backend.token_to_kv_pool
    keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
    queries = q.reshape(len(q), layer.tp_q_head_num, layer.qk_head_dim)
    out = torch.empty(*queries.shape[:2], values.shape[-1], dtype=q.dtype)
    for span in _spans(forward_batch, window if has_window else None):
        new = span.rows.stop - span.rows.start
        first = max(0, span.total - new - window) if has_window else 0
        rows = _rows(backend, layer, span, first)
        allowed = span.causal
        if has_window:
            allowed &= torch.ones_like(allowed).triu(span.total - new - window)
        attended = _attend(
            queries[span.rows], keys[rows], values[rows], allowed[:, first:], layer.scaling, sinks
        )
        out[span.rows] = attended
    return out.view(len(q), -1)


def _spans(forward_batch: Any, window: int | None) -> Iterator[Span]:
    """With a window in pieces, of which each looks at hardly more tokens than its own windows."""
    for span in spans(forward_batch):
        if window is None:
            yield span
        else:
            yield from span.pieces(max(window, PIECE_TOKENS_MIN))


def _write(backend: Any, layer: Any, forward_batch: Any, k: torch.Tensor, v: torch.Tensor) -> None:
    # Not at the top: SGLang's plugins are loaded before its modules.
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    where = KVWriteLoc(forward_batch.out_cache_loc, backend.swa_out_cache_loc)
    backend.token_to_kv_pool.set_kv_buffer(layer, where, k, v)


def _rows(backend: Any, layer: Any, span: Span, first: int) -> torch.Tensor:
    """Of the layer's buffers, for the request's tokens from ``first`` on."""
    table, pool = backend.req_to_token_pool.req_to_token, backend.token_to_kv_pool
    rows = table[span.table_row, first : span.total].long()
    if backend.use_sliding_window_kv_pool and pool.layers_mapping[layer.layer_id][1]:
        return pool.translate_loc_from_full_to_swa(rows)
    return rows


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    allowed: torch.Tensor,
    scaling: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Shapes (new, heads, numbers), (tokens, KV heads, numbers) twice, (new, tokens), and
    (heads,)."""
    repeats = queries.shape[1] // keys.shape[1]
    keys, values = (t.to(queries.dtype).repeat_interleave(repeats, 1) for t in (keys, values))
    scores = torch.einsum("nhd,thd->hnt", queries, keys) * scaling
    scores.masked_fill_(~allowed, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(-1, len(queries), 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : len(keys)]
    return torch.einsum("hnt,thd->nhd", weights, values)
