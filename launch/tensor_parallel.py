"""Engines of several tensor-parallel ranks: what they need beside SGLang's own flags."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from launch.settings import BadConfig

CPU_STAGING_MB = 256
"""Of each rank of D: more than one prefill chunk."""


def ranks_of(flags: list[str]) -> int:
    """Ranks of one engine, from the user's flags for SGLang; the last one counts."""
    ranks = 1
    for name, value in zip(flags, [*flags, ""][1:], strict=True):
        head, _, tail = name.partition("=")
        if head in ("--tp", "--tp-size", "--tensor-parallel-size"):
            ranks = int(tail or value)
    return ranks


def check_window(layers: int, ranks: Iterable[int]) -> None:
    """Raises :class:`BadConfig` for a layer window in engines of several ranks."""
    if layers and max(ranks, default=1) > 1:
        raise BadConfig("--prefill-layer-window needs engines of one rank: take it or --tp out.")


def binding_env(ranks: int) -> dict[str, str]:
    """On a CPU: the cores of each rank, which are all of them. Left to itself SGLang refuses
    more ranks than the machine has NUMA nodes."""
    if ranks == 1:
        return {}
    every_core = f"0-{(os.cpu_count() or 1) - 1}"
    return {"SGLANG_CPU_OMP_THREADS_BIND": "|".join([every_core] * ranks)}


def staging_env(model: Path, ranks: set[int], device: str) -> dict[str, str]:
    """Where P and D split the KV heads otherwise: SGLang gathers them in a staging buffer,
    instead of a write for each token. MLA has no heads to split, and SGLang refuses it."""
    if len(ranks) == 1 or _has_latent_kv(model):
        return {}
    env = {"SGLANG_DISAGG_STAGING_BUFFER": "1"}
    if device == "cpu":
        env["SGLANG_STAGING_USE_TORCH"] = "1"
        env["SGLANG_DISAGG_STAGING_POOL_SIZE_MB"] = str(CPU_STAGING_MB)
    return env


def _has_latent_kv(model: Path) -> bool:
    config = model / "config.json"
    return config.is_file() and "kv_lora_rank" in json.loads(config.read_text())
