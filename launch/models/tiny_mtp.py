"""The random model with a draft of the tests: ``--model tiny-mtp``.

A DeepSeek-V3.2 as :mod:`launch.models.tiny_dsa`, of two layers and one for multi-token
prediction. The first attends, the second has an MLP, and both do nothing else; the draft attends as
the first does, from the next token's embedding on, and knows nothing of the MLP. So it is right
about as often as the MLP changes nothing, as long as it has KV of its own for all of the prefix.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from launch.models import tiny_dsa
from launch.models.tiny_dsa import Weights
from launch.models.tiny_model import STOP_TOKENS, write_json, write_tokenizer

_LAYERS = 2
_ATTENTION_GAIN, _MLP_GAIN = 2.0, 1.0
_DRAFT = f"model.layers.{_LAYERS}."


def build(folder: Path) -> None:
    """Write config, weights, tokenizer and chat template into ``folder``."""
    silent = write_tokenizer(folder)
    config = tiny_dsa.config(_LAYERS) | {"num_nextn_predict_layers": 1}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", dict(STOP_TOKENS))
    save_file(_weights(silent), folder / "model.safetensors", metadata={"format": "pt"})


def _weights(silent_tokens: list[int]) -> dict[str, Weights]:
    weights = tiny_dsa.weights(silent_tokens, _LAYERS)
    first, second = (f"model.layers.{layer}." for layer in range(_LAYERS))
    embedding = weights["model.embed_tokens.weight"]
    # The draft's norm of it then changes nothing.
    embedding /= np.sqrt(np.square(embedding).mean(-1, keepdims=True))
    weights[first + "self_attn.o_proj.weight"] *= _ATTENTION_GAIN
    weights[first + "mlp.down_proj.weight"][:] = 0
    weights[second + "self_attn.o_proj.weight"][:] = 0
    weights[second + "mlp.down_proj.weight"] *= _MLP_GAIN
    alike = [name for name in weights if name.startswith(first) and ".mlp." not in name]
    weights |= {name.replace(first, _DRAFT): weights[name].copy() for name in alike}
    return weights | _draft_weights(weights["lm_head.weight"], embedding)


def _draft_weights(lm_head: Weights, embedding: Weights) -> dict[str, Weights]:
    """Beside its attention. Its experts, which SGLang demands, do nothing."""
    hidden, experts = lm_head.shape[1], tiny_dsa.EXPERTS
    eye, none = np.eye(hidden, dtype=np.float32), np.zeros((hidden, hidden), np.float32)
    weights = {
        "eh_proj.weight": np.concatenate([eye, none], 1),
        "shared_head.head.weight": lm_head.copy(),
        "embed_tokens.weight": embedding.copy(),
        "mlp.gate.weight": np.zeros((experts, hidden), np.float32),
        "mlp.gate.e_score_correction_bias": np.zeros(experts, np.float32),
    }
    for name in ("enorm", "hnorm", "shared_head.norm"):
        weights[f"{name}.weight"] = np.ones(hidden, np.float32)
    for expert in (*(f"experts.{i}" for i in range(experts)), "shared_experts"):
        for name in ("gate_proj", "up_proj"):
            weights[f"mlp.{expert}.{name}.weight"] = np.ones(
                (tiny_dsa.EXPERT_MLP, hidden), np.float32
            )
        weights[f"mlp.{expert}.down_proj.weight"] = np.zeros(
            (hidden, tiny_dsa.EXPERT_MLP), np.float32
        )
    return {_DRAFT + name: weight for name, weight in weights.items()}
