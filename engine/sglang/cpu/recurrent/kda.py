"""Kimi's delta attention (Kimi-Linear): the gated delta rule, where each number of a key fades at a
pace of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from engine.sglang.cpu.recurrent import gdn


def prompts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *_: Any,
    initial_state: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    lower_bound: float | None = None,
    output_intermediate_states: bool = False,
    track_state: torch.Tensor | None = None,
    track_chunk_idx: torch.Tensor | None = None,
    **__: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """For ``chunk_kda``. q, k, v, g: (1, tokens, heads, numbers); beta: (1, tokens, heads), before
    its sigmoid. Returns the output and, where asked, the states that enter each request's
    chunks; ``track_state`` gets, of each request, that of chunk ``track_chunk_idx`` unless -1."""
    out, entering = gdn.over_prompts(
        q,
        k,
        v,
        _stays(g, A_log, dt_bias, lower_bound, v.shape[2]),
        beta[0].float().sigmoid(),
        initial_state,
        initial_state_indices,
        cu_seqlens,
    )
    if track_state is not None and track_chunk_idx is not None:
        for request, chunk in enumerate(track_chunk_idx.tolist()):
            if chunk >= 0:
                track_state[request] = entering[request][chunk]
    if not output_intermediate_states:
        return out
    states = torch.stack([state for of_request in entering for state in of_request])
    return out, states[None].to(initial_state.dtype)


def tokens(
    *_: Any,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    lower_bound: float | None = None,
    **__: Any,
) -> torch.Tensor:
    """For ``fused_sigmoid_gating_delta_rule_update``: one of each request."""
    heads = v.shape[2]
    return gdn.over_tokens(
        q,
        k,
        v,
        _stays(a, A_log, dt_bias, lower_bound, heads),
        b.reshape(-1, heads).float().sigmoid(),
        initial_state_source,
        initial_state_indices,
    )


def _stays(
    a: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    lower_bound: float | None,
    heads: int,
) -> torch.Tensor:
    """How much of the state stays: (tokens, heads, keys)."""
    if lower_bound is not None:
        raise NotImplementedError("KDA's safe gate: use a GPU")
    a = a.reshape(-1, heads, dt_bias.numel() // heads).float()
    steps = F.softplus(a + dt_bias.float().view(a.shape[1:]))
    return torch.exp(-A_log.float().exp().view(heads, 1) * steps)
