"""The gated delta rule (Qwen3-Next), and what else of that model only a GPU runs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from engine.sglang.border import Use

_NORM = "models.qwen3_next.FusedRMSNormGated."
USES = (
    Use(_NORM + "forward", "the norm of what a recurrence gives"),
    Use(_NORM + "weight", "its weights"),
    Use(_NORM + "eps", "added under the root"),
    Use(_NORM + "activation", "of the gates"),
)
CHUNK_TOKENS = 64
"""Between the states of a prompt that may be kept: SGLang's FLA_CHUNK_SIZE."""


def gates(
    A_log: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """For ``fused_gdn_gating``: the logarithm of how much of the state stays, and how much of a
    value is written; (1, tokens, heads) each."""
    stays = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return stays[None], b.float().sigmoid()[None]


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
    **__: Any,
) -> tuple[torch.Tensor, None, torch.Tensor]:
    """For ``chunk_gated_delta_rule``: one after the other. q, k, v: (1, tokens, heads, numbers).
    Brings the slots of ``initial_state``, (slots, heads, values, keys), to the end; returns the
    output and the states that enter each request's chunks."""
    heads = v.shape[2]
    stays, written = g.reshape(-1, heads, 1).exp(), beta.reshape(-1, heads)
    out, entering = over_prompts(
        q, k, v, stays, written, initial_state, initial_state_indices, cu_seqlens
    )
    states = torch.stack([state for of_request in entering for state in of_request])
    return out, None, states[None].to(initial_state.dtype)


def over_prompts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    stays: torch.Tensor,
    written: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    bounds: torch.Tensor,
) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """The output, and of each request the states that enter its chunks; brings ``states`` to the
    end. ``stays``: (tokens, heads, 1), or a number for each of a key's; ``written``: (tokens,
    heads)."""
    queries, keys, values = _unit_heads(q, k, v)
    out, entering = torch.empty_like(values), list[list[torch.Tensor]]()
    ends = bounds.tolist()
    for i, slot in enumerate(slots.tolist()):
        state = states[slot].to(torch.float32, copy=True)
        entering.append([])
        for t in range(ends[i], ends[i + 1]):
            if (t - ends[i]) % CHUNK_TOKENS == 0:
                entering[i].append(state)
            out[t], state = _token(queries[t], keys[t], values[t], stays[t], written[t], state)
        states[slot] = state.to(states.dtype)
    return out[None].to(v.dtype), entering


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
    **__: Any,
) -> torch.Tensor:
    """For ``fused_sigmoid_gating_delta_rule_update``: one of each request."""
    heads = v.shape[2]
    stays, written = gates(A_log, a.reshape(-1, heads), b.reshape(-1, heads), dt_bias)
    return over_tokens(
        q, k, v, stays[0, ..., None].exp(), written[0], initial_state_source, initial_state_indices
    )


def over_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    stays: torch.Tensor,
    written: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """As :func:`over_prompts`, for one token of each request."""
    of_requests = states[slots.long()].float()
    out, new = _token(*_unit_heads(q, k, v), stays, written, of_requests)
    states[slots.long()] = new.to(states.dtype)
    return out[None].to(v.dtype)


def _token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    stays: torch.Tensor,
    written: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Any dimensions, then: (heads, numbers), (heads, 1 or keys) for what stays, (heads,) for what
    is written, (heads, values, keys)."""
    state = state * stays[..., None, :]
    change = (value - (state * key[..., None, :]).sum(-1)) * written[..., None]
    state = state + change[..., None] * key[..., None, :]
    return (state * query[..., None, :]).sum(-1), state


def _unit_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys of length one for each head of the values, the former scaled."""
    heads = v.shape[2]
    return _unit(q[0], heads) * q.shape[-1] ** -0.5, _unit(k[0], heads), v[0].float()


def _unit(x: torch.Tensor, heads: int) -> torch.Tensor:
    return F.normalize(x.float(), dim=-1).repeat_interleave(heads // x.shape[-2], -2)


def split(
    mixed_qkvz: torch.Tensor,
    mixed_ba: torch.Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For ``fused_qkvzba_split_reshape_cat``: of each head of the keys its q, k, values and gates,
    to all q, k and values; z; b; a."""
    count, each = len(mixed_qkvz), num_heads_v // num_heads_qk
    of_heads = mixed_qkvz.view(count, num_heads_qk, -1)
    q, k, v, z = of_heads.split([head_qk, head_qk, each * head_v, each * head_v], 2)
    b, a = mixed_ba.view(count, num_heads_qk, -1).split([each, each], 2)
    qkv = torch.cat([part.reshape(count, -1) for part in (q, k, v)], 1)
    return (
        qkv,
        z.reshape(count, num_heads_v, head_v),
        b.reshape(count, -1),
        a.reshape(count, -1),
    )


def gated_norm(norm: Any, x: torch.Tensor, g: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """For ``FusedRMSNormGated.forward``."""
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + norm.eps)
    gate = torch.sigmoid(g.float()) if norm.activation == "sigmoid" else F.silu(g.float())
    return (x.float() * scale * norm.weight.float() * gate).to(x.dtype)


def gated_expert(
    hidden_states: torch.Tensor, gate_weight: torch.Tensor, shared_output: torch.Tensor
) -> torch.Tensor:
    """For ``fused_gate_sigmoid_mul``: of the expert that all tokens share."""
    return torch.sigmoid(hidden_states @ gate_weight)[:, None] * shared_output


def add_gated_expert(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    final_hidden_states: torch.Tensor,
) -> None:
    """For ``fused_gate_sigmoid_mul_add``."""
    final_hidden_states += gated_expert(hidden_states, gate_weight, shared_output)
