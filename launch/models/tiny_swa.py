"""A random gpt-oss, for tests: ``--model tiny-swa``. Every other of its 8 layers attends to the
last 128 tokens, each head to a sink too; 4 experts, of which a token takes 2."""

from __future__ import annotations

from pathlib import Path

from launch.models.random_model import SHAPE, write


def build(folder: Path) -> None:
    """Write config, weights and tokenizer into ``folder``."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **SHAPE
        | {
            "num_hidden_layers": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 4,
            "sliding_window": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
            "intermediate_size": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        }
    )
    write(folder, GptOssForCausalLM(config))
