"""Greedy tokens of a model by transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def greedy(folder: Path, input_ids: list[int], new_tokens: int = 16) -> list[int]:
    """Remembered."""
    return list(_generated(folder, tuple(input_ids), new_tokens))


@cache
def _loaded(folder: Path) -> Any:
    torch.set_num_threads(1)  # on a busy machine more of them wait for each other
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@cache
def _generated(folder: Path, input_ids: tuple[int, ...], new_tokens: int) -> list[int]:
    with torch.no_grad():
        tokens = _loaded(folder).generate(
            torch.tensor([input_ids]),
            attention_mask=torch.ones(1, len(input_ids), dtype=torch.int64),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
    return tokens[0, len(input_ids) :].tolist()
