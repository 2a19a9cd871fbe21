"""Load or recompute: how many leading blocks of a hit are worth their way from storage.

Not in the paper. Loading b blocks takes the storage NICs' time, at their present backlogs;
the rest of the prompt is computed by the prefill engine, which meanwhile works off what it
already has. The sum is evaluated over b, so that a hit is never slower than a miss.
"""

from __future__ import annotations

import msgspec
import numpy as np

from scheduler.cluster_state import ClusterState
from scheduler.plan import PlanRequest

SHARES = np.linspace(0, 1, 33)
"""Of the hit, weighed against each other."""
GAIN_MIN = 0.05
"""Blocks are given up only for this part of the time to the first token: estimates err."""


class LoadEstimate(msgspec.Struct, frozen=True):
    """The two ends of the choice, and what was chosen. Times in seconds until the first token."""

    hit_blocks: int
    load_blocks: int
    load_all_s: float
    recompute_all_s: float
    chosen_s: float


def worth_loading(
    state: ClusterState,
    request: PlanRequest,
    prefill: int,
    hit_blocks: int,
    first_s: float,
    last_s: float,
) -> LoadEstimate:
    """``first_s``: when the first byte of the whole hit can come, ``last_s``: the last one.

    While the prefill engine's speed is not measured, every block is loaded.
    """
    engines = state.engines
    blocks = (SHARES * hit_blocks).astype(np.int64)
    read_s = np.where(blocks > 0, first_s + (last_s - first_s) * blocks / max(1, hit_blocks), 0.0)
    context = (blocks * request.page_tokens).astype(np.float64)
    compute_s = engines.compute_s(prefill, request.prompt_tokens - context, context)
    pending = engines.pending_tokens[prefill] + engines.promised[prefill, engines.TOKENS]
    busy_s = float(engines.compute_s(prefill, float(pending), 0.0)) if pending else 0.0
    first_token_s = np.maximum(read_s, busy_s) + compute_s
    whole, best = len(blocks) - 1, int(np.argmin(first_token_s))
    if not engines.prefill_cost[prefill].any():
        best = whole
    elif first_token_s[best] > (1 - GAIN_MIN) * first_token_s[whole]:
        best = whole
    return LoadEstimate(
        hit_blocks,
        int(blocks[best]),
        float(first_token_s[whole]),
        float(first_token_s[0]),
        float(first_token_s[best]),
    )
