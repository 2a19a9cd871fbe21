"""A random Qwen3-Next, for tests: ``--model tiny-gdn``. Three layers with a gated delta rule and
one with attention; 4 experts, of which a token takes 2, and one that all share."""

from __future__ import annotations

from pathlib import Path

from launch.models.random_model import SHAPE, write


def build(folder: Path) -> None:
    """Write config, weights and tokenizer into ``folder``."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    gdn = {
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    }
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
    }
    config = Qwen3NextConfig(**SHAPE | gdn | experts, num_hidden_layers=4)
    write(folder, Qwen3NextForCausalLM(config), full_attention_interval=4)
