"""The causal convolution ahead of a recurrence, and the ways of SGLang that lead here."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from engine.sglang.border import Use

USES = (
    Use("layers.attention.mamba.mamba", "given the convolutions, which it imports on GPUs alone"),
    Use(
        "layers.attention.linear.kernels.gdn_triton.TritonGDNKernel.supports_packed_decode",
        "set to False: a kernel of its own, for projections that are not split",
    ),
    Use(
        "layers.attention.linear.kernels.kda_triton.TritonKDAKernel.supports_packed_decode",
        "the same",
    ),
)


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens_cpu: Any = None,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | None = "silu",
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    """For ``causal_conv1d_fn``: prompts. ``x``: (channels, tokens of the batch); ``conv_states``:
    (slots, channels, width - 1), of which those that ``cache_indices`` names are brought up to
    the end of each request."""
    assert cache_indices is not None
    ends = query_start_loc.tolist()
    out = torch.empty_like(x)
    for i, slot in enumerate(cache_indices.tolist()):
        tokens = slice(ends[i], ends[i + 1])
        if slot < 0 or tokens.start == tokens.stop:
            continue
        before = conv_states[slot].to(x.dtype)
        if has_initial_state is None or not has_initial_state[i]:
            before = torch.zeros_like(before)
        whole = torch.cat([before, x[:, tokens]], 1)
        out[:, tokens] = F.conv1d(whole, weight[:, None].to(x.dtype), bias, groups=len(x))
        conv_states[slot] = whole[:, whole.shape[1] - before.shape[1] :].to(conv_states.dtype)
    return _activated(out, activation)


def convolve_token(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | bool | None = None,
    cache_seqlens: object = None,
    conv_state_indices: torch.Tensor | None = None,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    """For ``causal_conv1d_update``: one token of each request. ``x``: (requests, channels)."""
    assert conv_state_indices is not None
    slots = conv_state_indices.long()
    whole = torch.cat([conv_state[slots].to(x.dtype), x[:, :, None]], 2)
    conv_state[slots] = whole[:, :, 1:].to(conv_state.dtype)
    out = (whole * weight).sum(-1)
    return _activated(out if bias is None else out + bias, activation)


def _activated(x: torch.Tensor, activation: str | bool | None) -> torch.Tensor:
    return F.silu(x) if activation in ("silu", "swish", True) else x


def offer() -> None:
    """Also on what the hooks do not reach."""
    from sglang.srt.layers.attention.linear.kernels.gdn_triton import TritonGDNKernel
    from sglang.srt.layers.attention.linear.kernels.kda_triton import TritonKDAKernel
    from sglang.srt.layers.attention.mamba import mamba

    mamba.causal_conv1d_fn = mamba.causal_conv1d_fn_triton = convolve
    mamba.causal_conv1d_update = mamba.causal_conv1d_update_triton = convolve_token
    TritonGDNKernel.supports_packed_decode = TritonKDAKernel.supports_packed_decode = False
    # Without: each decode pins the mask of the states that it is to keep, and dies.
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
