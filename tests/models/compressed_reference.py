"""Greedy tokens of DeepSeek-V4 by transformers, with latents and index keys rounded as SGLang keeps
them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV4ForCausalLM
from transformers.cache_utils import DynamicCache

from engine.sglang.cpu.sparse.indexer import rotated
from engine.sglang.pools.packed_rows import round_trip, round_trip_keys


def _rounded_keys(keys: torch.Tensor) -> torch.Tensor:
    return rotated(round_trip_keys(rotated(keys)))  # the transform is its own inverse


_ROUNDED = {"compressor": round_trip, "indexer": _rounded_keys}


def greedy(folder: Path, input_ids: list[int], new_tokens: int = 16) -> list[int]:
    """Remembered."""
    return list(_generated(folder, tuple(input_ids), new_tokens))


@cache
def _loaded(folder: Path) -> DeepseekV4ForCausalLM:
    torch.set_num_threads(1)  # on a busy machine more of them wait for each other
    return DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _rounding_cache(config: Any) -> DynamicCache:
    kept = DynamicCache(config=config)
    for layer in kept.layers:
        _round(layer)
    return kept


def _round(layer: Any) -> None:
    update = layer.update
    layer.update = lambda k, v, *rest, **more: update(round_trip(k), round_trip(v), *rest, **more)
    if hasattr(layer, "update_compressor_states"):
        append = layer.update_compressor_states
        layer.update_compressor_states = lambda name, new: append(name, _ROUNDED[name](new))


@cache
def _generated(folder: Path, input_ids: tuple[int, ...], new_tokens: int) -> list[int]:
    model = _loaded(folder)
    with torch.no_grad():
        tokens = model.generate(
            torch.tensor([input_ids]),
            attention_mask=torch.ones(1, len(input_ids), dtype=torch.int64),
            past_key_values=_rounding_cache(model.config),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
    return tokens[0, len(input_ids) :].tolist()


SPOILERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "windows": lambda layer: {"keys": layer.keys},
    "groups of 4": lambda layer: _groups(layer, 4, "compressor"),
    "index keys": lambda layer: _groups(layer, 4, "indexer"),
    "groups of 128": lambda layer: _groups(layer, 128, "compressor"),
    "states": lambda layer: {
        f"{kind}_{name}": of[name]
        for kind in ("kv", "gate")
        for of in [getattr(layer, f"overlap_{kind}", {})]
        for name in of
    },
}
"""What a restored prefix consists of, by layer."""


def _groups(layer: Any, ratio: int, name: str) -> dict[str, Any]:
    if getattr(layer, "compress_rate", 0) != ratio:
        return {}
    return {name: layer.compressed_kv[name]}


def behind_a_prefix(
    folder: Path, ids: list[int], prefix: int, spoiler: str = "", new_tokens: int = 8
) -> list[int]:
    """Greedy tokens of a prompt whose prefix was computed before, some of it then noise."""
    model = _loaded(folder)
    kept = _rounding_cache(model.config)
    tokens: list[int] = []
    with torch.no_grad():
        model(torch.tensor([ids[:prefix]]), past_key_values=kept)
        for layer in kept.layers if spoiler else ():
            for values in SPOILERS[spoiler](layer).values():
                values.copy_(torch.randn(values.shape, generator=torch.Generator()) * 3)
        new = ids[prefix:]
        while len(tokens) < new_tokens:
            logits = model(torch.tensor([new]), past_key_values=kept).logits
            new = [int(logits[0, -1].argmax())]
            tokens += new
    return tokens
