"""Random models of other families, for tests: the shapes are transformers', the weights ours.

As in :mod:`launch.models.tiny_model`, greedy tokens depend on what is far back: q and k are loud,
so that attention picks few tokens, and what comes out of attention or a recurrence is louder than
the residual stream. A weight that is not named otherwise keeps the scale of its input.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from launch.models.tiny_model import STOP_TOKENS, Normals, write_json, write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SEED = 7
_LOGIT_SPREAD = 4.5
_OUTPUT_GAIN = 6.0

SHAPE: dict[str, object] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "dtype": "float32",
    **STOP_TOKENS,
}
"""What these models have in common."""

Weights = NDArray[np.float32]


def write(folder: Path, model: PreTrainedModel, **settings: object) -> None:
    """Give the model its weights and write it, with a tokenizer. ``settings``: of its
    ``config.json``, beside those that transformers writes."""
    import torch

    silent = write_tokenizer(folder)
    normals = Normals(_SEED)
    model.float()
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            value = _values(name, tuple(weight.shape), normals)
            if value is not None:
                weight.copy_(torch.from_numpy(value))
        if model.config.tie_word_embeddings:
            model.get_output_embeddings().weight /= math.sqrt(model.config.hidden_size)
        model.get_output_embeddings().weight[silent] = 0
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | settings
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", dict(STOP_TOKENS))


def _values(name: str, shape: tuple[int, ...], normals: Normals) -> Weights | None:
    """None: as transformers has it."""
    *_, owner, last = name.split(".")
    if last == "A_log":  # some heads remember long
        decays = np.linspace(0.002, 0.3, math.prod(shape), dtype=np.float32)
        return np.log(decays).reshape(shape)
    if last == "dt_bias":
        return np.full(shape, 0.5, np.float32)
    if last == "sinks":  # SGLang keeps them in bfloat16
        return (normals.array(shape, 1.0).view(np.uint32) & 0xFFFF0000).view(np.float32)
    if last.endswith("bias"):
        return np.zeros(shape, np.float32)
    if owner in ("q_norm", "k_norm"):  # beside the 1 that these families add
        return np.ones(shape, np.float32)
    if len(shape) == 1:  # norms
        return None
    if owner == "embed_tokens":
        return normals.array(shape, 1.0)
    if "conv" in owner:
        return normals.array(shape, 0.5)
    deviation = 1 / math.sqrt(shape[1])  # of experts [experts, in, out] too
    if owner in ("q_proj", "k_proj"):
        deviation *= math.sqrt(_LOGIT_SPREAD)
    if owner in ("o_proj", "out_proj"):
        deviation *= _OUTPUT_GAIN
    return normals.array(shape, deviation)
