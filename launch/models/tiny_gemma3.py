"""A random Gemma-3, for tests: ``--model tiny-gemma3``. Three of four layers attend to the last 128
tokens, by a mask over a pool that has the KV of all."""

from __future__ import annotations

from pathlib import Path

from launch.models.random_model import SHAPE, write


def build(folder: Path) -> None:
    """Write config, weights and tokenizer into ``folder``."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    windows = {
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
        "sliding_window": 128,
        "query_pre_attn_scalar": 64,
    }
    config = Gemma3TextConfig(
        **SHAPE | windows | {"num_hidden_layers": 8, "tie_word_embeddings": True}
    )
    write(folder, Gemma3ForCausalLM(config))
