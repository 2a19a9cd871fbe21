"""Engines of several ranks: what they need beside SGLang's own flags."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from engine.config import (
    CPU_COMPRESSED_VARIABLE,
    CPU_DRAFT_VARIABLE,
    CPU_GROUPS_VARIABLE,
    CPU_RECURRENT_VARIABLE,
    CPU_SPARSE_VARIABLE,
)
from launch.settings import BadConfig

CPU_STAGING_MB = 256
"""Of each rank of D: more than one prefill chunk."""

_WITHOUT_KERNELS = {
    "SGLANG_OPT_USE_FUSED_HASH_TOPK": "0",
    "SGLANG_OPT_USE_TILELANG_MHC_PRE": "0",
    "SGLANG_OPT_USE_TILELANG_MHC_POST": "0",
    "SGLANG_DSV4_FP4_EXPERTS": "0",
    "SGLANG_OPT_FP8_WO_A_GEMM": "0",
}
"""Of DeepSeek-V4: what SGLang itself can do with torch."""

_UNSUPPORTED = (
    ("--pp-size", "--pp", "--pipeline-parallel-size"),
    ("--attn-cp-size", "--attention-context-parallel-size"),
)

_OF_RECURRENT_LAYERS = (
    "mamba_d_state",  # Falcon-H1, Granite-4
    "ssm_state_size",  # Nemotron-H
    "linear_key_head_dim",  # Qwen3-Next
    "linear_attn_config",  # Kimi-Linear
)
"""In a model's config."""


@dataclass(frozen=True)
class EngineRanks:
    """The processes of one engine. Each of its attention groups has requests and a KV pool of
    its own, and splits the KV heads among its ranks."""

    total: int = 1
    groups: int = 1
    hosts: int = 1
    """Over which they are spread equally, in their order."""

    @property
    def of_group(self) -> int:
        return self.total // self.groups

    @property
    def of_host(self) -> int:
        return self.total // self.hosts

    def groups_at(self, host: int) -> range:
        """Those that have ranks on one of the hosts."""
        first, last = host * self.of_host, (host + 1) * self.of_host - 1
        return range(first // self.of_group, last // self.of_group + 1)

    def led_at(self, host: int) -> list[int]:
        """Groups whose first rank is there: it alone speaks for them."""
        return [g for g in self.groups_at(host) if g * self.of_group // self.of_host == host]

    @property
    def meet(self) -> bool:
        """They meet at ports of SGLang's ``--dist-init-addr``."""
        return self.groups > 1 or self.hosts > 1


def ranks_of(flags: list[str]) -> EngineRanks:
    """Of one engine, from the user's flags for SGLang, of which the last ones count. Raises
    :class:`BadConfig` for engines that are parallel in a way that is not supported."""
    ranks = _size(flags, "--tp", "--tp-size", "--tensor-parallel-size")
    groups = _size(flags, "--attn-dp-size", "--attention-data-parallel-size")
    replicas = _size(flags, "--dp", "--dp-size", "--data-parallel-size")
    if "--enable-dp-attention" in flags and groups == 1:  # SGLang's older name for the groups
        groups, replicas = replicas, 1
    if replicas > 1:
        raise BadConfig("--dp-size: start more engines with --prefill and --decode instead.")
    for names in _UNSUPPORTED:
        if _size(flags, *names) > 1:
            raise BadConfig(f"{names[0]} is not supported (--tp is): take it out.")
    if ranks % groups:
        raise BadConfig(f"--attn-dp-size {groups} must divide --tp {ranks}.")
    hosts = _size(flags, "--nnodes")
    if hosts < 1 or ranks % hosts:
        raise BadConfig(f"--nnodes {hosts} must divide --tp {ranks}: each host has as many ranks.")
    return EngineRanks(ranks, groups, hosts)


def group_names(engine: str, ranks: EngineRanks) -> list[str]:
    """What the gateway and the agents call an engine's attention groups, each of which is an
    engine to them."""
    if ranks.groups == 1:
        return [engine]
    return [f"{engine}.{group}" for group in range(ranks.groups)]


def _size(flags: list[str], *names: str) -> int:
    """What the last of these flags says; 1 without one."""
    return int(_value(flags, *names) or 1)


def _value(flags: list[str], *names: str) -> str:
    """What the last of these flags says; empty without one."""
    said = ""
    for name, value in zip(flags, [*flags, ""][1:], strict=True):
        head, _, tail = name.partition("=")
        if head in names:
            said = tail or value
    return said


def check_kv_types(prefill: list[str], decode: list[str]) -> None:
    """Of the engines' flags: raises :class:`BadConfig` for KV of two types, which no prefill and
    decode engine could exchange. What the flags leave to SGLang the gateway compares."""
    kinds = [_value(flags, "--kv-cache-dtype") or "auto" for flags in (prefill, decode)]
    if kinds[0] != kinds[1]:
        raise BadConfig(
            f"prefill engines have --kv-cache-dtype {kinds[0]}, decode engines {kinds[1]}: KV goes "
            "from one to the other as it lies. Give all the same, in --engine-args."
        )


def check_window(model: Path, prefill_ranks: int, decode_ranks: int) -> None:
    """For prefill engines with a layer window: raises :class:`BadConfig` if their KV cannot
    leave page by page while it is there, which it can where each rank has a peer with the
    same heads, or where one rank has all there is (MLA)."""
    alike = prefill_ranks == decode_ranks
    if not alike and not (prefill_ranks == 1 and _has_latent_kv(model)):
        raise BadConfig(
            "--prefill-layer-window needs the same --tp in --prefill-args and --decode-args "
            "(or prefill engines of one rank, with an MLA model): make them equal, or take the "
            "window out."
        )


def cpu_env(flags: list[str], model: Path) -> dict[str, str]:
    """Of an engine with these flags, on a CPU."""
    ranks, env = ranks_of(flags), dict[str, str]()
    if "--enable-torch-compile" not in flags:
        # SGLang has a few small operators compiled when they are first used: a quarter of a minute
        # in C++ for masks and penalties, at each start (an embedding of ranks), or in mid-request.
        # With the second variable the compiler is not even imported: half a second of CPU time.
        env |= {"TORCH_COMPILE_DISABLE": "1", "TORCHDYNAMO_DISABLE": "1"}
    if ranks.total > 1:
        # The cores of each rank, which are all of them. Left to itself SGLang refuses more ranks
        # than the machine has NUMA nodes.
        every_core = f"0-{(os.cpu_count() or 1) - 1}"
        env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join([every_core] * ranks.total)
    if ranks.groups > 1:
        env[CPU_GROUPS_VARIABLE] = "1"
    if has_sparse_attention(model):
        env[CPU_SPARSE_VARIABLE] = "1"
    if has_compressed_attention(model):
        env |= {CPU_COMPRESSED_VARIABLE: "1", **_WITHOUT_KERNELS}
    if any(flag.startswith("--speculative-algorithm") for flag in flags):
        env |= {CPU_DRAFT_VARIABLE: "1", "TRITON_INTERPRET": "1"}
    if has_recurrent_layers(model):
        env[CPU_RECURRENT_VARIABLE] = "1"
        # By itself SGLang keeps inputs of convolutions in bfloat16, whatever they are computed in.
        env["SGLANG_MAMBA_CONV_DTYPE"] = "float32"
    return env


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
    return _says(model, "kv_lora_rank")


def has_sparse_attention(model: Path) -> bool:
    """DeepSeek-V3.2's."""
    return _says(model, "index_topk") and not has_compressed_attention(model)


def has_compressed_attention(model: Path) -> bool:
    """DeepSeek-V4's."""
    return _says(model, "compress_ratios")


def has_recurrent_layers(model: Path) -> bool:
    """Mamba-2's, gated delta rules or Kimi's."""
    return any(_says(model, name) for name in _OF_RECURRENT_LAYERS)


def _says(model: Path, name: str) -> bool:
    config = model / "config.json"
    return config.is_file() and name in json.loads(config.read_text())
