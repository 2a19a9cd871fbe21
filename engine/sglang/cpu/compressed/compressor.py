"""Groups of 4 or 128 tokens become one latent (or index key), by a softmax over their scores.

Groups of 4 overlap: each takes the tokens of the one before it as well. What the tokens of the
last groups bring is kept in the pool (a *state*): of 4 by pages of the sliding window, of 128 by
request.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.sglang.border import Use
from engine.sglang.cpu.compressed.model import rotated, scaled_to_one
from engine.sglang.cpu.spans import Span

_COMPRESSOR = "layers.attention.dsv4.compressor.Compressor."
_STATES = "mem_cache.deepseek_v4_compress_state.CompressStatePool."
_POOL = "mem_cache.deepseek_v4_memory_pool.DeepSeekV4TokenToKVPool."
USES = (
    Use(_COMPRESSOR + "get_state_pool", "the states; waits for the layer's delivery"),
    Use(_COMPRESSOR + "ratio", "tokens of a group"),
    Use(_COMPRESSOR + "overlap", "whether groups overlap"),
    Use(_COMPRESSOR + "head_dim", "numbers of what a group becomes"),
    Use(_COMPRESSOR + "ape", "added to the scores, by place in the group"),
    Use(_COMPRESSOR + "norm", "of what a group becomes"),
    Use("layers.layernorm.RMSNorm.weight", "its factors"),
    Use("layers.layernorm.RMSNorm.variance_epsilon", "its least variance"),
    Use(_COMPRESSOR + "freqs_cis", "positions"),
    Use(
        "layers.attention.torch_native_backend.TorchNativeAttnBackend.token_to_kv_pool", "the pool"
    ),
    Use(_STATES + "kv_score_buffer", "their memory"),
    Use(_STATES + "request_scoped", "whether they are by request"),
    Use(_STATES + "translate_from_swa_loc_to_state_loc", "where a token's is"),
    Use(_STATES + "translate_from_req_position_to_state_loc", "where a token's is"),
    Use(_POOL + "translate_loc_from_full_to_swa", "a token's row of the sliding window"),
    Use(_POOL + "swa_page_size", "tokens of a page there"),
)


def compressed(
    compressor: Any, span: Span, brought: torch.Tensor, backend: Any
) -> tuple[int, torch.Tensor]:
    """The groups that the new tokens of a request fill: which is the first, and what they become,
    shape (groups, numbers). ``brought``: by each new token."""
    ratio, start = compressor.ratio, span.total - len(brought)
    first = start // ratio
    since = (first - compressor.overlap) * ratio
    kept = _States(compressor, span, backend)
    tokens = torch.cat([kept.read(torch.arange(since, start)), brought])
    kept.write(start, brought)
    full = span.total // ratio
    groups = tokens[: full * ratio - since].view(-1, ratio, tokens.shape[-1])
    out = _weighted(compressor, groups)
    out = scaled_to_one(out, compressor.norm.variance_epsilon) * compressor.norm.weight
    return first, rotated(out, compressor.freqs_cis, torch.arange(first, full) * ratio)


def _weighted(compressor: Any, groups: torch.Tensor) -> torch.Tensor:
    numbers, scores = groups.chunk(2, -1)
    size = compressor.head_dim
    if compressor.overlap:
        numbers, scores = (
            torch.cat([part[:-1, :, :size], part[1:, :, size:]], 1) for part in (numbers, scores)
        )
    weights = (scores + compressor.ape.view(-1, size)).softmax(1)
    return (numbers * weights).sum(1)


class _States:
    """Of one request."""

    def __init__(self, compressor: Any, span: Span, backend: Any) -> None:
        self._pool = compressor.get_state_pool(backend)
        self._kv_pool = backend.token_to_kv_pool
        self._table = backend.req_to_token_pool.req_to_token[span.table_row]
        self._span, self._compressor = span, compressor

    def read(self, positions: torch.Tensor) -> torch.Tensor:
        """Before the first token there is nothing, with no weight."""
        states = self._pool.kv_score_buffer.kv_score[self._rows(positions.clamp_min(0))].clone()
        numbers, scores = states.chunk(2, -1)
        before = (positions < 0)[:, None]
        numbers.masked_fill_(before, 0)
        scores.masked_fill_(before, float("-inf"))
        return states

    def write(self, start: int, brought: torch.Tensor) -> None:
        """Of the group that is not full, and where they overlap, of the last full one: at the end
        and at the end of each page."""
        ratio, page = self._compressor.ratio, self._kv_pool.swa_page_size
        positions = torch.arange(start, self._span.total)
        needed = positions >= (self._span.total // ratio - self._compressor.overlap) * ratio
        if self._compressor.overlap:
            needed |= positions % page >= page - ratio
        rows = self._rows(positions[needed])
        self._pool.kv_score_buffer.kv_score[rows] = brought[needed]

    def _rows(self, positions: torch.Tensor) -> torch.Tensor:
        if self._pool.request_scoped:
            row = torch.full_like(positions, self._span.table_row)
            return self._pool.translate_from_req_position_to_state_loc(row, positions)
        rows = self._kv_pool.translate_loc_from_full_to_swa(self._table[positions].long())
        return self._pool.translate_from_swa_loc_to_state_loc(rows)
