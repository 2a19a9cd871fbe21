"""What the model's own code has computed by kernels."""

from __future__ import annotations

from typing import Any

import torch

from engine.sglang.border import Use
from engine.sglang.pools.packed_rows import write_latents

_LAYER = "models.deepseek_v4.DeepseekV4DecoderLayerBase."
_MODEL = "models.deepseek_v4.DeepseekV4Model."
USES = (
    Use("entrypoints.openai.serving_base.OpenAIServingBase.tokenizer_manager", "has the tokenizer"),
    Use("managers.tokenizer_manager.TokenizerManager.tokenizer", "may have a template for chats"),
    Use("models.deepseek_v4.hc_head_torch", "the last of them by torch"),
    Use("models.deepseek_v4_mhc.MHC_POST_MULT_VALUE", "a factor of theirs"),
    Use(_LAYER + "rms_norm_eps", "of their norm"),
    Use(_LAYER + "hc_eps", "of their weights"),
    Use(_LAYER + "hc_sinkhorn_iters", "how often rows and columns are made sum to one"),
    Use(_MODEL + "norm_eps", "of the last one's norm"),
    Use(_MODEL + "hc_eps", "of the last one's weights"),
)


def rotated(
    x: torch.Tensor, freqs_cis: torch.Tensor, positions: torch.Tensor, backwards: bool = False
) -> torch.Tensor:
    """The last numbers of x, shape (tokens, ..., n), turned in pairs by their positions."""
    size = 2 * freqs_cis.shape[-1]
    turns = freqs_cis[positions.long()]
    turns = (turns.conj() if backwards else turns)[(..., *[None] * (x.dim() - 2), slice(None))]
    pairs = x[..., -size:].float().unflatten(-1, (size // 2, 2)).contiguous()
    pairs = torch.view_as_complex(pairs)
    tail = torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
    return torch.cat([x[..., :-size], tail], -1)


def scaled_to_one(x: torch.Tensor, eps: float) -> torch.Tensor:
    """By the root of its mean square."""
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps).to(x.dtype)


def around_rejection(original: Any, platform: Any, *, subsystem: str) -> None:
    """AROUND ``reject_out_of_tree_path``."""
    if "DeepSeek-V4" not in subsystem:
        original(platform, subsystem=subsystem)


def around_encoding(original: Any, serving: Any) -> Any:
    """AROUND ``OpenAIServingChat._resolve_chat_encoding_spec``: None is the model's template."""
    template = getattr(serving.tokenizer_manager.tokenizer, "chat_template", None)
    return None if template else original(serving)


def normed_queries(
    q_input: torch.Tensor,
    q_output: torch.Tensor,
    eps: float,
    freqs_cis: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """For ``fused_q_norm_rope``."""
    q_output.copy_(rotated(scaled_to_one(q_input, eps), freqs_cis, positions))


def rotate(
    q: torch.Tensor,
    k: torch.Tensor | None,
    freqs_cis: torch.Tensor,
    positions: torch.Tensor,
    inverse: bool = False,
) -> None:
    """For ``fused_rope_inplace``."""
    for x in (q, k):
        if x is not None:
            x.copy_(rotated(x, freqs_cis, positions, inverse))


def store_normed(
    kv: torch.Tensor,
    kv_weight: torch.Tensor,
    eps: float,
    freqs_cis: torch.Tensor,
    positions: torch.Tensor,
    out_loc: torch.Tensor,
    kvcache: torch.Tensor,
    page_size: int,
    layout: object = None,
    q: torch.Tensor | None = None,
) -> None:
    """For ``fused_k_norm_rope_flashmla``: into rows of the sliding windows."""
    latents = rotated(scaled_to_one(kv, eps) * kv_weight, freqs_cis, positions)
    write_latents(kvcache, page_size, out_loc.long(), latents)


def output_of_groups(
    o: torch.Tensor,
    wo_a: torch.Tensor,
    is_decode: bool = False,
    is_target_verify: bool = False,
    fuse_mxfp8_quant: bool = False,
    is_prefill: bool = False,
    fast_path: bool = False,
    fp8_grid: bool = False,
    emit_fp8: bool = False,
) -> torch.Tensor:
    """For ``_apply_wo_a_bf16_matmul``: the weights are bfloat16, whatever the rest is."""
    return torch.einsum("tgd,grd->tgr", o, wo_a.to(o.dtype))


def enter_hyper_connection(
    layer: Any,
    x: torch.Tensor,
    hc_fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    norm: Any = None,
    forward_batch: Any = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """For ``DeepseekV4DecoderLayerBase.hc_pre``: of streams, shape (tokens, streams, numbers), what
    goes into a part of the layer, how much of its output each stream gets, and of each other. The
    norm is left to the caller."""
    from sglang.srt.models.deepseek_v4_mhc import MHC_POST_MULT_VALUE

    streams, eps = x.shape[1], layer.hc_eps
    mixed = torch.nn.functional.linear(
        scaled_to_one(x.flatten(1).float(), layer.rms_norm_eps), hc_fn
    )
    sizes = [streams, streams, streams * streams]
    into, out_of, among = (
        part * scale + base
        for part, scale, base in zip(
            mixed.split(sizes, -1), hc_scale, hc_base.split(sizes), strict=True
        )
    )
    shares = among.view(-1, streams, streams).softmax(-1) + eps
    shares = shares / (shares.sum(-2, keepdim=True) + eps)
    for _ in range(layer.hc_sinkhorn_iters - 1):
        shares = shares / (shares.sum(-1, keepdim=True) + eps)
        shares = shares / (shares.sum(-2, keepdim=True) + eps)
    entering = ((into.sigmoid() + eps)[..., None] * x.float()).sum(1)
    return entering.to(x.dtype), MHC_POST_MULT_VALUE * out_of.sigmoid(), shares, False


def leave_hyper_connections(
    model: Any,
    x: torch.Tensor,
    hc_fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
) -> torch.Tensor:
    """For ``DeepseekV4Model.hc_head``."""
    from sglang.srt.models.deepseek_v4 import hc_head_torch

    return hc_head_torch(x, hc_fn, hc_scale, hc_base, norm_eps=model.norm_eps, hc_eps=model.hc_eps)
