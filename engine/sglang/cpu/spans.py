"""The requests of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from engine.sglang.border import Use

_BATCH = "model_executor.forward_batch_info.ForwardBatch."
USES = (
    Use(_BATCH + "seq_lens", "tokens of each request"),
    Use(_BATCH + "extend_seq_lens", "the new ones"),
    Use(_BATCH + "req_pool_indices", "its row of the table"),
    Use(_BATCH + "forward_mode", "whether each request has one new token"),
    Use(
        "model_executor.forward_batch_info.ForwardMode.is_decode_or_idle",
        "whether each request has one new token",
    ),
    Use(
        "model_executor.forward_batch_info.ForwardMode.is_target_verify",
        "whether each has the tokens of its draft",
    ),
    Use(_BATCH + "spec_info", "how many these are"),
    Use("speculative.eagle_info.EagleVerifyInput.draft_token_num", "how many these are"),
)


class Span(NamedTuple):
    """One request's part of a batch."""

    rows: slice
    """Of the batch: its new tokens."""
    total: int
    """All its tokens; the new ones are the last."""
    table_row: int

    @property
    def causal(self) -> torch.Tensor:
        """Shape (new, total): which tokens are not after which."""
        new = self.rows.stop - self.rows.start
        return torch.ones(new, self.total, dtype=torch.bool).tril(self.total - new)

    def pieces(self, tokens: int) -> Iterator[Span]:
        """Of so many new tokens each, the last one perhaps of fewer."""
        for start in range(self.rows.start, self.rows.stop, tokens):
            stop = min(start + tokens, self.rows.stop)
            yield Span(slice(start, stop), self.total - (self.rows.stop - stop), self.table_row)


def spans(batch: Any) -> Iterator[Span]:
    """Of the requests of a ``ForwardBatch``."""
    totals, rows = batch.seq_lens.tolist(), batch.req_pool_indices.tolist()
    if batch.forward_mode.is_decode_or_idle():
        news = [1] * len(totals)
    elif batch.forward_mode.is_target_verify():  # tokens of a draft do not count yet
        news = [batch.spec_info.draft_token_num] * len(totals)
        totals = [total + new for total, new in zip(totals, news, strict=True)]
    else:
        news = batch.extend_seq_lens.tolist()
    start = 0
    for new, total, row in zip(news, totals, rows, strict=True):
        yield Span(slice(start, start + new), total, row)
        start += new
