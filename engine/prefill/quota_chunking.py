"""Prefill batches packed to a quota of attention time (``--prefill-quota-ms``): what the
engine knows of them. ``engine/sglang/prefill/quota_adder.py`` packs."""

from __future__ import annotations

import logging
from collections import deque

from engine.prefill.cost_fit import CostFit
from engine.prefill.forward_clock import ForwardSample
from scheduler.quota import Chunk, QuotaBatch

log = logging.getLogger(__name__)

_PACKED_MAX = 8
"""Batches packed whose forward has not been seen: SGLang keeps two in flight."""


class QuotaChunking:
    """Packs batches by the fitted cost of attention, and compares it with what they took."""

    def __init__(self, attention: CostFit, quota_s: float, page_tokens: int) -> None:
        self.quota_s = quota_s
        self._attention = attention
        self._page_tokens = page_tokens
        self._packed: deque[QuotaBatch] = deque(maxlen=_PACKED_MAX)
        self.batches_total = 0
        self.over_quota_total = 0
        """Batches that took longer than the quota."""
        self.estimated_s_total = 0.0
        self.attention_s_total = 0.0

    def new_batch(self) -> QuotaBatch:
        """For one pass of SGLang's scheduler, which may find nobody for it."""
        cost = self._attention.cost()
        assert cost is not None, "quota chunking starts with a profile"
        return QuotaBatch(cost, self.quota_s, self._page_tokens)

    def add(self, batch: QuotaBatch, chunk: Chunk, is_cut: bool) -> None:
        """The chunk joins the batch, which will run."""
        if not batch.chunks:
            self._packed.append(batch)
        batch.add(chunk, is_cut)

    def took(self, sample: ForwardSample) -> None:
        """A batch's forward has run."""
        chunks = list(map(Chunk, sample.context_tokens, sample.new_tokens))
        while self._packed:
            batch = self._packed.popleft()
            if batch.chunks == chunks:
                break
        else:
            return
        self.batches_total += 1
        self.over_quota_total += sample.attention_s > self.quota_s
        self.estimated_s_total += batch.spent_s
        self.attention_s_total += sample.attention_s
        log.info(
            "prefill batch requests=%d new_tokens=%d context_tokens=%d quota_s=%g full=%d "
            "estimated_s=%.6f attention_s=%.6f forward_s=%.6f",
            len(chunks),
            sum(sample.new_tokens),
            sum(sample.context_tokens),
            self.quota_s,
            batch.closed,
            batch.spent_s,
            sample.attention_s,
            sample.forward_s,
        )
