"""The random model with sparse attention of the tests: ``--model tiny-dsa``.

A DeepSeek-V3.2 of 6 dense layers, each with an indexer but the last, which takes the choice of
the one before; each token attends to 64 others. Latents have 192 numbers, index keys 132 bytes a
token. The gains are those of :mod:`launch.models.tiny_model`, for the same reason.

The indexer looks for what the attention looks for, as a trained one does: as many heads, and for
a key the attention's, which all heads share, with its position. A random one proves nothing: a
token at the edge of the choice would carry much attention, and of the index keys of 1000 tokens
a few round otherwise on each machine. Channel 0 of the residual stream is the same positive
number everywhere, by which every head counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from launch.models.tiny_model import STOP_TOKENS, Normals, write_json, write_tokenizer

_SEED = 7
_VOCAB, _HIDDEN, _LAYERS, _MLP = 2048, 256, 6, 512
_HEADS, _QUERY_RANK, _LATENT = 2, 96, 128
_NOPE, _ROPE, _VALUE = 64, 64, 64
_INDEX = _NOPE + _ROPE
_LOGIT_SPREAD, _OUTPUT_GAIN = 6.0, 3.0
EXPERTS, EXPERT_MLP = 4, 128
"""Which no layer has."""
_HALVES = [*range(0, _ROPE, 2), *range(1, _ROPE, 2)]
"""The attention turns neighbours, the indexer a half with the other."""

Weights = NDArray[np.float32]


def build(folder: Path) -> None:
    """Write config, weights, tokenizer and chat template into ``folder``."""
    silent = write_tokenizer(folder)
    write_json(folder / "config.json", config(_LAYERS))
    write_json(folder / "generation_config.json", dict(STOP_TOKENS))
    save_file(weights(silent, _LAYERS), folder / "model.safetensors", metadata={"format": "pt"})


def weights(silent_tokens: list[int], layers: int) -> dict[str, Weights]:
    """By their names in a checkpoint."""
    normals = Normals(_SEED)
    lm_head = normals.array((_VOCAB, _HIDDEN), 1 / math.sqrt(_HIDDEN))
    embedding = normals.array((_VOCAB, _HIDDEN), 1.0)
    lm_head[silent_tokens] = 0
    lm_head[:, 0], embedding[:, 0] = 0, 2
    named = {
        "lm_head.weight": lm_head,
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": np.ones(_HIDDEN, np.float32),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        named |= {prefix + name: value for name, value in _layer_weights(normals)}
    return named


def _layer_weights(normals: Normals) -> Iterator[tuple[str, Weights]]:
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{name}.weight", np.ones(_HIDDEN, np.float32)
    for name, value in _attention_weights(normals):
        yield f"self_attn.{name}", value
    even = 1 / math.sqrt(_HIDDEN)
    yield "mlp.gate_proj.weight", normals.array((_MLP, _HIDDEN), even)
    yield "mlp.up_proj.weight", normals.array((_MLP, _HIDDEN), even)
    down = normals.array((_HIDDEN, _MLP), 1 / math.sqrt(_MLP))
    down[0] = 0
    yield "mlp.down_proj.weight", down


def _attention_weights(normals: Normals) -> Iterator[tuple[str, Weights]]:
    spread = math.sqrt(_LOGIT_SPREAD)
    even = 1 / math.sqrt(_HIDDEN)
    query_shape = (_HEADS, _NOPE + _ROPE, _QUERY_RANK)
    query = normals.array(query_shape, math.sqrt(2 * _LOGIT_SPREAD / _QUERY_RANK))
    latent = normals.array((_LATENT, _HIDDEN), even)
    rope_key = normals.array((_ROPE, _HIDDEN), spread * even)
    key = normals.array((_NOPE, _LATENT), spread / math.sqrt(_LATENT))
    value = normals.array((_HEADS, _VALUE, _LATENT), 1 / math.sqrt(_LATENT))
    output = normals.array((_HIDDEN, _HEADS * _VALUE), _OUTPUT_GAIN / math.sqrt(_HEADS * _VALUE))
    output[0] = 0
    heads = [np.concatenate([key, of_head]) for of_head in value]
    yield "q_a_proj.weight", normals.array((_QUERY_RANK, _HIDDEN), even)
    yield "q_a_layernorm.weight", np.ones(_QUERY_RANK, np.float32)
    yield "q_b_proj.weight", query.reshape(-1, _QUERY_RANK)
    yield "kv_a_proj_with_mqa.weight", np.concatenate([latent, rope_key])
    yield "kv_a_layernorm.weight", np.ones(_LATENT, np.float32)
    yield "kv_b_proj.weight", np.concatenate(heads)
    yield "o_proj.weight", output
    index_query = np.concatenate([query[:, _NOPE:][:, _HALVES], query[:, :_NOPE]], axis=1)
    # In float64: how a product of matrices adds up is the machine's affair.
    nope_key = (key.astype(np.float64) @ latent.astype(np.float64)).astype(np.float32)
    head_weights = np.zeros((_HEADS, _HIDDEN), np.float32)
    head_weights[:, 0] = 1
    yield "indexer.wq_b.weight", index_query.reshape(-1, _QUERY_RANK)
    yield "indexer.wk.weight", np.concatenate([rope_key[_HALVES], nope_key])
    yield "indexer.k_norm.weight", np.ones(_INDEX, np.float32)
    yield "indexer.k_norm.bias", np.zeros(_INDEX, np.float32)
    yield "indexer.weights_proj.weight", head_weights


def config(layers: int) -> dict[str, object]:
    """The last of several layers shares an indexer."""
    return {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "dtype": "float32",
        "vocab_size": _VOCAB,
        "hidden_size": _HIDDEN,
        "intermediate_size": _MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "q_lora_rank": _QUERY_RANK,
        "kv_lora_rank": _LATENT,
        "qk_nope_head_dim": _NOPE,
        "qk_rope_head_dim": _ROPE,
        "v_head_dim": _VALUE,
        "index_n_heads": _HEADS,
        "index_head_dim": _INDEX,
        "index_topk": 64,
        "index_topk_pattern": "F" * (layers - 1) + "S",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "first_k_dense_replace": layers,
        "moe_layer_freq": 1,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": EXPERT_MLP,
        "n_group": 1,
        "topk_group": 1,
        "ep_size": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    } | STOP_TOKENS
