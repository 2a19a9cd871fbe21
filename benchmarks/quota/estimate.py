"""Part one, by the cost model alone: ranks that pack the trace's requests, step by step.

In every step each rank packs one batch, and the step lasts as long as the longest of them, as
in a data-parallel attention group. Requests go to the rank that has the fewest tokens waiting, and
wait in a common queue while all have enough (the gateway's rule, the paper's beta).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import msgspec
import numpy as np

from benchmarks.trace import PAGE_TOKENS
from common.prefill_cost import PrefillCost
from scheduler.quota import Chunk, QuotaBatch, pack

GPU = PrefillCost(base_s=0.001, token_s=0.0, pair_s=5.2e-9, context_s=1.3e-7)
"""Attention of a 32B model of 64 layers with 40 heads and 8 KV heads of 128 in 16 bit, at 250
TFLOP/s (1.3 MFLOP a pair) and 2 TB/s (262 kB of KV a token): arithmetic, not a measurement."""
QUOTA_S = 0.3
"""The paper's."""
TOKENS_MAX = 16_384
"""SGLang's ``--chunked-prefill-size`` on the largest GPUs."""
WAITING_TOKENS_MAX = 40_000
"""At one rank: five seconds of the paper's beta at 8,000 tokens a second."""


class Estimated(msgspec.Struct, frozen=True):
    """What the ranks' batches came to. Max/Avg: the sum over the steps of the longest batch,
    over that of the mean one."""

    ranks: int
    steps: int
    busy_steps: int
    """Steps in which each rank had more waiting than it packed."""
    max_avg: float
    """In busy steps."""
    max_avg_to_the_end: float
    """In all steps, also those in which ranks have run dry."""
    mean_tokens: float
    """New tokens of a batch in busy steps."""
    largest_s: float


def run(
    requests: Sequence[Chunk], ranks: int, cost: PrefillCost, quota_s: float, tokens_max: int
) -> Estimated:
    """Pack all requests, which are there from the beginning."""
    common, queues = deque(requests), [deque[Chunk]() for _ in range(ranks)]
    seconds: list[list[float]] = []
    tokens: list[list[int]] = []
    busy: list[bool] = []
    while common or any(queues):
        _hand_out(common, queues)
        batches = [_packed(queue, cost, quota_s, tokens_max) for queue in queues]
        seconds.append([batch.spent_s if batch.chunks else 0.0 for batch in batches])
        tokens.append([sum(chunk.new_tokens for chunk in batch.chunks) for batch in batches])
        busy.append(all(queues))
    of_steps, mask = np.array(seconds), np.array(busy)
    return Estimated(
        ranks=ranks,
        steps=len(of_steps),
        busy_steps=int(mask.sum()),
        max_avg=max_over_mean(of_steps[mask]),
        max_avg_to_the_end=max_over_mean(of_steps),
        mean_tokens=float(np.array(tokens)[mask].mean()),
        largest_s=float(of_steps.max()),
    )


def compare(requests: Sequence[Chunk], ranks: int) -> dict[str, Estimated]:
    """The quota, and fixed-size chunks that make batches of as many tokens in the mean."""
    quota = run(requests, ranks, GPU, QUOTA_S, TOKENS_MAX)
    fixed_tokens = max(1, round(quota.mean_tokens / PAGE_TOKENS)) * PAGE_TOKENS
    return {"quota": quota, "fixed": run(requests, ranks, GPU, math.inf, fixed_tokens)}


def max_over_mean(of_steps: np.ndarray) -> float:
    """Shape (steps, ranks)."""
    return float(of_steps.max(axis=1).sum() / of_steps.mean(axis=1).sum())


def _hand_out(common: deque[Chunk], queues: Sequence[deque[Chunk]]) -> None:
    waiting = [sum(chunk.new_tokens for chunk in queue) for queue in queues]
    while common and min(waiting) < WAITING_TOKENS_MAX:
        rank = waiting.index(min(waiting))
        queues[rank].append(common.popleft())
        waiting[rank] += queues[rank][-1].new_tokens


def _packed(queue: deque[Chunk], cost: PrefillCost, quota_s: float, tokens_max: int) -> QuotaBatch:
    """Takes what joins the batch out of the queue; the rest of a cut request stays at its head."""
    batch = QuotaBatch(cost, quota_s, PAGE_TOKENS)
    pack(queue, batch, tokens_max)
    for chunk in batch.chunks:
        request = queue.popleft()
        if left := request.new_tokens - chunk.new_tokens:
            queue.appendleft(Chunk(sum(chunk), left))
    return batch
