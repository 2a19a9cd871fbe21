"""A random DeepSeek-V4, for tests: ``--model tiny-v4``.

Four layers: windows alone, groups of 4 tokens with an indexer, groups of 128, groups of 4 again.
Each has 4 experts, of which a token takes 2; in the first layer the token says which. Latents have
512 numbers and index keys 128, as SGLang's pool wants them.

Weights that SGLang keeps in bfloat16 have no more digits than that. The indexer looks for what the
attention looks for, as in :mod:`launch.models.tiny_dsa`: of queries the last 128 numbers alone are
not 0, and index keys are made as those numbers of latents are.
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
_VOCAB, _HIDDEN = 2048, 256
_RATIOS = (0, 4, 128, 4)
_HEADS, _QUERY_RANK, _LATENT, _KEY, _ROPE = 2, 96, 512, 128, 64
_GROUPS, _GROUP_RANK = 2, 64
_STREAMS = 2
_EXPERTS, _EXPERTS_PER_TOKEN, _MLP = 4, 2, 128
_LOGIT_SPREAD, _OUTPUT_GAIN = 6.0, 3.0

Weights = NDArray[np.generic]


def build(folder: Path) -> None:
    """Write config, weights and tokenizer into ``folder``."""
    silent = write_tokenizer(folder)
    write_json(folder / "config.json", _config())
    write_json(folder / "generation_config.json", dict(STOP_TOKENS))
    save_file(_weights(silent), folder / "model.safetensors", metadata={"format": "pt"})


def _weights(silent_tokens: list[int]) -> dict[str, Weights]:
    """By their names in DeepSeek's checkpoints."""
    normals = Normals(_SEED)
    head = normals.array((_VOCAB, _HIDDEN), 1 / math.sqrt(_HIDDEN))
    embedding = normals.array((_VOCAB, _HIDDEN), 1.0)
    head[silent_tokens] = 0
    head[:, 0], embedding[:, 0] = 0, 2
    named: dict[str, Weights] = {
        "head.weight": head,
        "embed.weight": embedding,
        "norm.weight": np.ones(_HIDDEN, np.float32),
        **dict(_streams(normals, "hc_head", _STREAMS, 1)),
    }
    for number, ratio in enumerate(_RATIOS):
        for name, value in _layer(normals, number, ratio):
            named[f"layers.{number}.{name}"] = value
    return named


def _streams(
    normals: Normals, name: str, outputs: int, scales: int
) -> Iterator[tuple[str, Weights]]:
    """A hyper-connection."""
    inputs = _STREAMS * _HIDDEN
    yield f"{name}_fn", normals.array((outputs, inputs), 1 / math.sqrt(inputs))
    yield f"{name}_base", normals.array((outputs,), 0.5)
    yield f"{name}_scale", np.ones(scales, np.float32)


def _layer(normals: Normals, number: int, ratio: int) -> Iterator[tuple[str, Weights]]:
    for part in ("attn", "ffn"):
        yield f"{part}_norm.weight", np.ones(_HIDDEN, np.float32)
        yield from _streams(normals, f"hc_{part}", (2 + _STREAMS) * _STREAMS, 3)
    for name, value in _attention(normals, ratio):
        yield f"attn.{name}", value
    yield "ffn.gate.weight", normals.array((_EXPERTS, _HIDDEN), 1 / math.sqrt(_HIDDEN))
    if number:
        yield "ffn.gate.bias", np.zeros(_EXPERTS, np.float32)
    else:
        tokens = np.arange(_VOCAB)[:, None]
        yield "ffn.gate.tid2eid", (tokens + [0, 1]) % _EXPERTS
    for expert in ["shared_experts", *(f"experts.{e}" for e in range(_EXPERTS))]:
        yield f"ffn.{expert}.w1.weight", normals.array((_MLP, _HIDDEN), 1 / math.sqrt(_HIDDEN))
        yield f"ffn.{expert}.w3.weight", normals.array((_MLP, _HIDDEN), 1 / math.sqrt(_HIDDEN))
        down = normals.array((_HIDDEN, _MLP), 1 / math.sqrt(_MLP))
        down[0] = 0
        yield f"ffn.{expert}.w2.weight", down


def _attention(normals: Normals, ratio: int) -> Iterator[tuple[str, Weights]]:
    even = 1 / math.sqrt(_HIDDEN)
    deviation = math.sqrt(1 / _QUERY_RANK)
    key_queries = _short(normals.array((_HEADS, _KEY, _QUERY_RANK), deviation))
    queries = np.zeros((_HEADS, _LATENT, _QUERY_RANK), np.float32)
    queries[:, -_KEY:] = key_queries
    yield "wq_a.weight", normals.array((_QUERY_RANK, _HIDDEN), even)
    yield "q_norm.weight", np.ones(_QUERY_RANK, np.float32)
    yield "wq_b.weight", queries.reshape(-1, _QUERY_RANK)
    yield "wkv.weight", normals.array((_LATENT, _HIDDEN), even)
    yield "kv_norm.weight", np.full(_LATENT, _LOGIT_SPREAD / 2, np.float32)
    yield "attn_sink", normals.array((_HEADS,), 1.0)
    inputs = _HEADS * _LATENT // _GROUPS
    groups = normals.array((_GROUPS * _GROUP_RANK, inputs), 1 / math.sqrt(inputs))
    yield "wo_a.weight", _short(groups)
    rank = _GROUPS * _GROUP_RANK
    output = normals.array((_HIDDEN, rank), _OUTPUT_GAIN / math.sqrt(rank))
    output[0] = 0
    yield "wo_b.weight", output
    if not ratio:
        return
    series = 2 if ratio == 4 else 1
    made = {
        "wkv.weight": _short(normals.array((series, _LATENT, _HIDDEN), even)),
        "wgate.weight": _short(normals.array((series, _LATENT, _HIDDEN), even)),
    }
    places = normals.array((ratio, series, _LATENT), 0.5)
    for name, value in made.items():
        yield f"compressor.{name}", value.reshape(-1, _HIDDEN)
    yield "compressor.ape", places.reshape(ratio, -1)
    yield "compressor.norm.weight", np.full(_LATENT, _LOGIT_SPREAD / 2, np.float32)
    if ratio != 4:
        return
    for name, value in made.items():
        yield f"indexer.compressor.{name}", value[:, -_KEY:].reshape(-1, _HIDDEN)
    yield "indexer.compressor.ape", places[:, :, -_KEY:].reshape(ratio, -1)
    yield "indexer.compressor.norm.weight", np.ones(_KEY, np.float32)
    yield "indexer.wq_b.weight", key_queries.reshape(-1, _QUERY_RANK)
    head_weights = np.zeros((_HEADS, _HIDDEN), np.float32)
    head_weights[:, 0] = 1
    yield "indexer.weights_proj.weight", head_weights


def _short(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cut to the digits of bfloat16."""
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


def _config() -> dict[str, object]:
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "dtype": "float32",
        "vocab_size": _VOCAB,
        "hidden_size": _HIDDEN,
        "num_hidden_layers": len(_RATIOS),
        "num_attention_heads": _HEADS,
        "num_key_value_heads": 1,
        "head_dim": _LATENT,
        "qk_rope_head_dim": _ROPE,
        "q_lora_rank": _QUERY_RANK,
        "o_groups": _GROUPS,
        "o_lora_rank": _GROUP_RANK,
        "sliding_window": 128,
        "compress_ratios": list(_RATIOS),
        "compress_rope_theta": 40000.0,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 8192,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "max_position_embeddings": 32768,
        "index_n_heads": _HEADS,
        "index_head_dim": _KEY,
        "index_topk": 32,
        "hc_mult": _STREAMS,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "num_hash_layers": 1,
        "n_routed_experts": _EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": _EXPERTS_PER_TOKEN,
        "moe_intermediate_size": _MLP,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 0,
    } | STOP_TOKENS
