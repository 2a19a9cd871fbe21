"""Attention over the last 128 tokens and, in layers that compress, over groups before: all of 128
tokens, and of those of 4 the ones that an indexer picks."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from engine.sglang.border import Use
from engine.sglang.cpu.compressed.compressor import compressed
from engine.sglang.cpu.compressed.model import rotated
from engine.sglang.cpu.spans import Span, spans
from engine.sglang.cpu.sparse.indexer import rotated as hadamard
from engine.sglang.pools.packed_rows import read_keys, read_latents, write_keys, write_latents

_INDEXER = "layers.attention.dsv4.indexer.C4Indexer."
_POOL = "mem_cache.deepseek_v4_memory_pool.DeepSeekV4TokenToKVPool."
_LAYER = "layers.radix_attention.RadixAttention."
USES = (
    Use("layers.attention.attention_registry.ATTENTION_BACKENDS", "given ours as `dsv4`"),
    Use("layers.attention.torch_native_backend.TorchNativeAttnBackend", "what ours is otherwise"),
    Use(_POOL + "translate_loc_from_full_to_swa", "rows of the sliding window"),
    Use(_POOL + "get_swa_key_buffer_radix", "its latents; waits for the layer's delivery"),
    Use(_POOL + "get_swa_key_page_size", "tokens of a page there"),
    Use(_POOL + "sliding_window", "tokens that it has"),
    Use(_POOL + "get_extra_key_buffer", "latents of groups; waits as well"),
    Use(_POOL + "get_extra_key_page_size", "groups of a page"),
    Use(_POOL + "get_index_k_with_scale_buffer", "index keys of groups; waits as well"),
    Use(_POOL + "get_index_k_page_size", "groups of a page there"),
    Use(_LAYER + "scaling", "of the scores"),
    Use(_LAYER + "layer_id", "which layer it is"),
    Use(_INDEXER + "wq_b", "queries"),
    Use(_INDEXER + "weights_proj", "how much each head counts"),
    Use("layers.linear.ReplicatedLinear.parameters", "the weights of both"),
    Use(_INDEXER + "weight_scale", "of the scores"),
    Use(_INDEXER + "n_heads", "heads of queries"),
    Use(_INDEXER + "head_dim", "numbers of a key"),
    Use(_INDEXER + "index_topk", "groups to be chosen"),
    Use(_INDEXER + "freqs_cis", "positions"),
    Use(_INDEXER + "compressor", "makes the keys"),
    Use("layers.attention.dsv4.compressor.Compressor.compute_kv_score", "what each token brings"),
    Use("layers.attention.dsv4.compressor.Compressor.ratio", "tokens of a group"),
    Use("model_executor.forward_batch_info.ForwardBatch.out_cache_loc", "rows for the new tokens"),
    Use("model_executor.forward_batch_info.ForwardBatch.positions", "of the new tokens"),
    Use("model_executor.forward_batch_info.ForwardMode.is_idle", "a batch of nothing"),
)


class CompressedAttention(TorchNativeAttnBackend):
    """As the model's code calls it, for prompts and for single tokens."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self._chosen: list[torch.Tensor] = []
        """Of the layer that is being computed, by request: the groups each token may look at."""

    def get_swa_out_cache_loc(self, batch: Any) -> torch.Tensor:
        """Rows for the new tokens."""
        return self.token_to_kv_pool.translate_loc_from_full_to_swa(batch.out_cache_loc)

    def forward_core_compressor(
        self, x: torch.Tensor, batch: Any, layer_id: int, compressor: Any
    ) -> None:
        """Write the latents of groups that are full now."""
        pool = self.token_to_kv_pool
        if batch.forward_mode.is_idle():
            return
        page = pool.get_extra_key_page_size(layer_id)
        buffer = pool.get_extra_key_buffer(layer_id)
        for rows, latents in self._of_groups(x, batch, compressor):
            write_latents(buffer, page, rows, latents)

    def forward_c4_indexer(
        self, x: torch.Tensor, q_lora: torch.Tensor, c4_indexer: Any, forward_batch: Any, **_: Any
    ) -> None:
        """Write the index keys of groups that are full now, and choose for each token."""
        if forward_batch.forward_mode.is_idle():
            return
        pool, indexer = self.token_to_kv_pool, c4_indexer
        page, ratio = pool.get_index_k_page_size(), indexer.compressor.ratio
        buffer = pool.get_index_k_with_scale_buffer(indexer.layer_id)
        for rows, keys in self._of_groups(x, forward_batch, indexer.compressor):
            write_keys(buffer, page, rows, hadamard(keys))
        queries = _through(indexer.wq_b, q_lora)
        queries = queries.view(len(x), indexer.n_heads, indexer.head_dim)
        queries = hadamard(rotated(queries, indexer.freqs_cis, forward_batch.positions))
        weights = _through(indexer.weights_proj, x)
        weights = weights * indexer.weight_scale
        self._chosen = []
        for span in spans(forward_batch):
            keys = read_keys(buffer, page, self._group_rows(span, ratio))
            scores = torch.einsum("nhd,gd->nhg", queries[span.rows], keys).relu_()
            scores = torch.einsum("nhg,nh->ng", scores, weights[span.rows])
            allowed = _full_groups(span, ratio)
            scores.masked_fill_(~allowed, float("-inf"))
            top = scores.topk(min(indexer.index_topk, scores.shape[1]), -1).indices
            self._chosen.append(allowed & torch.zeros_like(allowed).scatter_(1, top, True))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        compress_ratio: int = 0,
        attn_sink: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Queries, shape (tokens, heads, LATENT); their keys are in the pool."""
        out = torch.zeros_like(q)
        if forward_batch.forward_mode.is_idle() or attn_sink is None:
            return out
        for number, span in enumerate(spans(forward_batch)):
            latents, allowed = self._window(layer.layer_id, span)
            if compress_ratio:
                groups = self._groups(layer.layer_id, span, compress_ratio)
                latents = torch.cat([latents, groups])
                seen = (
                    self._chosen[number]
                    if compress_ratio == 4
                    else _full_groups(span, compress_ratio)
                )
                allowed = torch.cat([allowed, seen], 1)
            # Nothing times a row that nobody has written (NaN) is NaN.
            latents = torch.where(allowed.any(0)[:, None], latents, 0)
            scores = torch.einsum("nhd,td->nht", q[span.rows].float(), latents) * layer.scaling
            scores.masked_fill_(~allowed[:, None], float("-inf"))
            sinks = attn_sink.float()[None, :, None].expand(len(scores), -1, 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
            out[span.rows] = torch.einsum("nht,td->nhd", weights, latents).to(q.dtype)
        return out

    def _window(self, layer_id: int, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents of the new tokens' windows, and which of them each may look at."""
        pool = self.token_to_kv_pool
        start, size = span.total - (span.rows.stop - span.rows.start), pool.sliding_window
        first = max(0, start - size + 1)
        places = torch.arange(first, span.total)
        rows = self.req_to_token_pool.req_to_token[span.table_row, first : span.total].long()
        rows = pool.translate_loc_from_full_to_swa(rows).long()
        buffer = pool.get_swa_key_buffer_radix(layer_id)
        behind = torch.arange(start, span.total)[:, None] - places
        latents = read_latents(buffer, pool.get_swa_key_page_size(), rows)
        return latents, (behind >= 0) & (behind < size)

    def _groups(self, layer_id: int, span: Span, ratio: int) -> torch.Tensor:
        pool = self.token_to_kv_pool
        page = pool.get_extra_key_page_size(layer_id)
        buffer = pool.get_extra_key_buffer(layer_id)
        return read_latents(buffer, page, self._group_rows(span, ratio))

    def _group_rows(self, span: Span, ratio: int, first: int = 0) -> torch.Tensor:
        """Rows of the full groups from the first one on."""
        ends = torch.arange(first + 1, span.total // ratio + 1) * ratio - 1
        return self.req_to_token_pool.req_to_token[span.table_row, ends].long() // ratio

    def _of_groups(self, x: torch.Tensor, batch: Any, compressor: Any) -> Any:
        """Of each request the rows of the groups that are full now, and what they became."""
        brought = compressor.compute_kv_score(x, batch)
        for span in spans(batch):
            first, values = compressed(compressor, span, brought[span.rows], self)
            if len(values):
                yield self._group_rows(span, compressor.ratio, first), values


def _through(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """The weight is bfloat16, whatever the rest is."""
    (weight,) = linear.parameters()
    return torch.nn.functional.linear(x.float(), weight.float())


def _full_groups(span: Span, ratio: int) -> torch.Tensor:
    """Shape (new, groups): which are full at each new token."""
    start = span.total - (span.rows.stop - span.rows.start)
    full = (torch.arange(start, span.total) + 1) // ratio
    return torch.arange(span.total // ratio) < full[:, None]


def offer() -> None:
    """Also on what the hooks do not reach."""
    ATTENTION_BACKENDS["dsv4"] = CompressedAttention
