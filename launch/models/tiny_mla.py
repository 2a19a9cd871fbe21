"""A random DeepSeek-V2, for tests: ``--model tiny-mla``. Latent KV (MLA) in 6 layers, and experts
in the last two. The gains are those of :mod:`launch.models.tiny_model`: output depends on tokens
far back.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from launch.models.tiny_model import STOP_TOKENS, write_json, write_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

_LAYERS, _DENSE_LAYERS = 6, 4
_HIDDEN, _HEADS, _LATENT, _NOPE, _ROPE = 256, 4, 64, 64, 32
_LOGIT_SPREAD, _OUTPUT_GAIN = 4.5, 12.0
PAGE_BYTES = 64 * (_LATENT + _ROPE) * 4
BLOCK_BYTES = _LAYERS * PAGE_BYTES


def build(folder: Path) -> None:
    """Write config, weights and tokenizer into ``folder``."""
    import torch
    from transformers import DeepseekV2ForCausalLM

    silent = write_tokenizer(folder)
    model = DeepseekV2ForCausalLM(_config()).float().eval()
    with torch.no_grad():
        _fill(model, torch.Generator().manual_seed(7))
        model.lm_head.weight[silent] = 0
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"moe_layer_freq": 1, "scoring_func": "softmax", "ep_size": 1, "rope_theta": 10000.0}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", dict(STOP_TOKENS))


def _config() -> DeepseekV2Config:
    from transformers import DeepseekV2Config

    return DeepseekV2Config(
        vocab_size=2048,
        hidden_size=_HIDDEN,
        intermediate_size=512,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        kv_lora_rank=_LATENT,
        q_lora_rank=96,
        qk_nope_head_dim=_NOPE,
        qk_rope_head_dim=_ROPE,
        v_head_dim=64,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        first_k_dense_replace=_DENSE_LAYERS,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        bos_token_id=None,
        torch_dtype="float32",
        **STOP_TOKENS,
    )


def _fill(model: DeepseekV2ForCausalLM, generator: torch.Generator) -> None:
    import torch

    def normal(weight: torch.Tensor, deviation: float) -> None:
        weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)

    normal(model.model.embed_tokens.weight, 1.0)
    normal(model.lm_head.weight, 1 / math.sqrt(_HIDDEN))
    for layer in model.model.layers:
        for name, weight in layer.self_attn.named_parameters():
            if "layernorm" in name:
                continue
            normal(weight, 1 / math.sqrt(weight.shape[1]))
            if name.startswith("q_b_proj"):
                weight.mul_((2 * _LOGIT_SPREAD) ** 0.5)
            if name.startswith("kv_b_proj"):
                weight.view(_HEADS, -1, _LATENT)[:, :_NOPE].mul_(_LOGIT_SPREAD**0.5)
            if name.startswith("kv_a_proj"):
                weight[_LATENT:].mul_(_LOGIT_SPREAD**0.5)
            if name.startswith("o_proj"):
                weight.mul_(_OUTPUT_GAIN)
        for _, weight in layer.mlp.named_parameters():
            normal(weight, 1 / math.sqrt(weight.shape[-1]))
