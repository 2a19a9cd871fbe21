"""Greedy tokens of a model with sparse attention by transformers, whose index keys are rounded as
SGLang keeps them: rotated, to float8 with a power of two for each key."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV32ForCausalLM
from transformers.cache_utils import DynamicCache

from engine.sglang.cpu.sparse.indexer import quantized, rotated


def rounded(keys: torch.Tensor) -> torch.Tensor:
    numbers, scales = quantized(rotated(keys))
    return rotated(numbers.float() * scales)  # the transform is its own inverse


def reference(
    folder: Path, input_ids: list[int], new_tokens: int = 16, spoilt: bool = False
) -> list[int]:
    """Remembered. ``spoilt``: the prompt's index keys are other tokens' from the first new token
    on, as if a decode engine had been given their latents alone."""
    return list(_generated(folder, tuple(input_ids), new_tokens, spoilt))


@cache
def _loaded(folder: Path) -> DeepseekV32ForCausalLM:
    torch.set_num_threads(1)  # on a busy machine more of them wait for each other
    model = DeepseekV32ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pattern = json.loads((folder / "config.json").read_text())["index_topk_pattern"]
    chosen: list[Any] = []
    for layer, kind in zip(model.model.layers, pattern, strict=True):
        _follow(layer.self_attn.indexer, kind == "S", chosen)
    return model


def _follow(indexer: Any, is_shared: bool, chosen: list[Any]) -> None:
    """Layers take the last choice of another's indexer; transformers has no such layers."""
    own = indexer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not is_shared:
            chosen[:] = [own(*args, **kwargs)]
        return chosen[0]

    indexer.forward = forward


class _RoundedKeys(DynamicCache):
    spoilt = False

    def update_indexer(self, keys: torch.Tensor, layer: int) -> torch.Tensor:
        kept = super().update_indexer(rounded(keys), layer)
        return kept.roll(37, 1) if self.spoilt and kept.shape[1] > keys.shape[1] else kept


@cache
def _generated(
    folder: Path, input_ids: tuple[int, ...], new_tokens: int, spoilt: bool
) -> list[int]:
    model = _loaded(folder)
    cache = _RoundedKeys(config=model.config)
    cache.spoilt = spoilt
    with torch.no_grad():
        tokens = model.generate(
            torch.tensor([input_ids]),
            attention_mask=torch.ones(1, len(input_ids), dtype=torch.int64),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
    return tokens[0, len(input_ids) :].tolist()
