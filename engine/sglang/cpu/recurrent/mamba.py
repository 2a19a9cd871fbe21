"""Mamba-2's recurrence, and the copies of states that SGLang's prefix cache keeps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    *_: Any,
    cu_seqlens: torch.Tensor,
    out: torch.Tensor,
    state_dtype: torch.dtype | None = None,
    track_seq_idx: torch.Tensor | None = None,
    track_end_locs: torch.Tensor | None = None,
    **__: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """For ``mamba_chunk_scan_combined``: prompts, one after the other. x: (1, tokens, heads,
    numbers); dt: (1, tokens, heads); B, C: (1, tokens, groups, state).

    Fills ``out`` and returns states, (..., heads, numbers, state) each: those that enter the
    chunks of ``chunk_size`` tokens of the batch, (1, chunks, ...); at the end of each request;
    and at the tokens ``track_end_locs`` of the batch, or None without any.
    """
    heads = x.shape[2]
    x, B, C = (_by_head(of[0].float(), heads) for of in (x, B, C))
    steps = F.softplus(dt[0].float() + (0 if dt_bias is None else dt_bias.float()))
    nothing = x.new_zeros(*x.shape[1:], B.shape[-1])
    entering = nothing.repeat(-(-len(x) // chunk_size), 1, 1, 1)
    wanted: list[int] = [] if track_end_locs is None else track_end_locs.tolist()
    y, at_ends, tracked = torch.empty_like(x), [], {}
    bounds = cu_seqlens.tolist()
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        state = nothing if initial_states is None else initial_states[i].float()
        chunks = range(start + -start % chunk_size, end, chunk_size)
        cuts = sorted({start, end, *chunks, *(at for at in wanted if start < at <= end)})
        for first, last in zip(cuts, cuts[1:], strict=False):
            if first % chunk_size == 0:
                entering[first // chunk_size] = state
            part = slice(first, last)
            y[part], state = _chunk(x[part], steps[part], A.float(), B[part], C[part], state)
            tracked[last] = state
        at_ends.append(state)
    y += x * (D.float()[:, None] if D.dim() == 1 else D.float())
    out.copy_(y.view(out.shape))
    dtype = state_dtype or torch.float32
    kept = torch.stack([tracked[at] for at in wanted]).to(dtype)[None] if wanted else None
    return entering.to(dtype)[None], torch.stack(at_ends).to(dtype), kept


def _chunk(
    x: torch.Tensor,
    steps: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one request: what it gives, and the state at the end."""
    decay = torch.cumsum(steps * A, 0)  # logarithms, (tokens, heads)
    between = torch.exp((decay[:, None] - decay).clamp(max=0))
    between *= torch.ones(len(x), len(x)).tril()[:, :, None]
    weights = torch.einsum("ihn,jhn->ijh", C, B) * between * steps
    y = torch.einsum("ijh,jhp->ihp", weights, x)
    y += torch.einsum("ihn,hpn->ihp", C, state) * torch.exp(decay)[..., None]
    until_end = torch.exp(decay[-1] - decay) * steps
    state = state * torch.exp(decay[-1])[:, None, None]
    return y, state + torch.einsum("jh,jhp,jhn->hpn", until_end, x, B)


def step(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
    *_: Any,
    out: torch.Tensor,
    **__: Any,
) -> None:
    """For ``selective_state_update``: one token of each request. state: (slots, heads, numbers,
    state); x, dt: (requests, heads, numbers); B, C: (requests, groups, state). Fills ``out``."""
    assert state_batch_indices is not None
    slots = state_batch_indices.long()
    steps = F.softplus(dt.float() + (0 if dt_bias is None else dt_bias.float()))
    B, C = (_by_head(of.float(), x.shape[1]) for of in (B, C))
    new = state[slots].float() * torch.exp(steps[..., None] * A)
    new += (steps * x.float())[..., None] * B[:, :, None]
    state[slots] = new.to(state.dtype)
    out.copy_((new * C[:, :, None]).sum(-1) + x.float() * D)


def _by_head(of_groups: torch.Tensor, heads: int) -> torch.Tensor:
    return of_groups.repeat_interleave(heads // of_groups.shape[1], 1)


def keep_states(
    conv_states: torch.Tensor,
    ssm_states: torch.Tensor,
    cache_indices: torch.Tensor,
    mamba_track_mask: torch.Tensor,
    mamba_track_indices: torch.Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
) -> None:
    """For ``track_mamba_states_if_needed``: copy the slots of some requests of a decode."""
    requests = mamba_track_mask[:batch_size].nonzero()[:, 0]
    source, target = cache_indices[requests].long(), mamba_track_indices[requests].long()
    for pool in (conv_states, ssm_states):
        pool[target] = pool[source]


def keep_states_of_all_layers(
    conv_states_pool: torch.Tensor, ssm_states_pool: torch.Tensor, *slots: Any, **named: Any
) -> None:
    """For ``track_mamba_states_all_layers``: the same of pools with a first dimension more."""
    for conv_states, ssm_states in zip(conv_states_pool, ssm_states_pool, strict=True):
        keep_states(conv_states, ssm_states, *slots, **named)
