"""A small DeepSeek-V2 with random weights: latent KV (MLA), and experts in the last layers.

Built with transformers, which is also the reference: greedy tokens of :func:`reference`. The
gains are those of :mod:`launch.models.tiny_model`: output depends on tokens far back.
"""

from __future__ import annotations

import json
import math
import shutil
from functools import cache
from pathlib import Path

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

_LAYERS, _DENSE_LAYERS = 6, 4
_HIDDEN, _HEADS, _LATENT, _NOPE, _ROPE = 256, 4, 64, 64, 32
_LOGIT_SPREAD, _OUTPUT_GAIN = 4.5, 12.0
PAGE_BYTES = 64 * (_LATENT + _ROPE) * 4
BLOCK_BYTES = _LAYERS * PAGE_BYTES


def build(folder: Path, tokenizer_of: Path) -> None:
    """Write the model into ``folder``, with another model's tokenizer."""
    model = DeepseekV2ForCausalLM(_config()).float().eval()
    with torch.no_grad():
        _fill(model, torch.Generator().manual_seed(7))
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"moe_layer_freq": 1, "scoring_func": "softmax", "ep_size": 1, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_of / name, folder)


@cache
def _loaded(folder: Path) -> DeepseekV2ForCausalLM:
    return DeepseekV2ForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()


def reference(folder: Path, input_ids: list[int], new_tokens: int = 16) -> list[int]:
    """Greedy tokens by transformers, remembered."""
    return list(_generated(folder, tuple(input_ids), new_tokens))


@cache
def _generated(folder: Path, input_ids: tuple[int, ...], new_tokens: int) -> list[int]:
    model = _loaded(folder)
    with torch.no_grad():
        tokens = model.generate(
            torch.tensor([input_ids]),
            attention_mask=torch.ones(1, len(input_ids), dtype=torch.int64),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
    return tokens[0, len(input_ids) :].tolist()


def _config() -> DeepseekV2Config:
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
        eos_token_id=2,
        pad_token_id=0,
        torch_dtype="float32",
    )


def _fill(model: DeepseekV2ForCausalLM, generator: torch.Generator) -> None:
    def normal(weight: torch.Tensor, deviation: float) -> None:
        weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)

    normal(model.model.embed_tokens.weight, 1.0)
    normal(model.lm_head.weight, 1 / math.sqrt(_HIDDEN))
    model.lm_head.weight[:3].zero_()
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
