"""How an engine is started: SGLang's flags and environment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from common.cluster.membership import Role
from launch.cluster.layout import ENGINE_ROLES, Layout, page_tokens
from launch.cluster.ports import BOOTSTRAP, BOOTSTRAP_FLAG, meeting
from launch.cluster.tensor_parallel import (
    cpu_env,
    has_compressed_attention,
    has_recurrent_layers,
    has_sparse_attention,
    staging_env,
)
from launch.flags.node import NodeSettings

CPU_POOL_TOKENS = 65536
CPU_STATE_SLOTS = 64
ROLE_FLAG = "--disaggregation-mode"

_LINKER = {
    "linker": "PrefillLinker",
    "linker_module_path": "engine.sglang.prefill.linker",
    "linker_extra_config": {},
}


def served_model_name(config: NodeSettings) -> str:
    """``--served-model-name``, or the model's own name."""
    if config.served_model_name:
        return config.served_model_name
    return {"default": "SmolLM2-135M-Instruct"}.get(config.model, Path(config.model).name)


def engine_env(layout: Layout, node: str) -> dict[str, str]:
    """What only engines need in their environment."""
    env = {
        "SGLANG_HOST_IP": layout.hosts[node],
        # Pages of an aborted request stay held until P can no longer write to them.
        "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE": "1",
        "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "2",
        # P sends nothing to a D that failed once until a probe finds it: by default after
        # 30 s at first, minutes later on, for a D that was suspended for a moment.
        "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S": "1",
        "SGLANG_FAILED_SESSION_PROBE_MAX_INTERVAL_S": "4",
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
        # An engine that has lost one of its processes would be kept for 65 s, to look into it.
        "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
        # What P has cached and D lacks leaves with the rest, layer by layer.
        "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX": "0",
        **staging_env(
            layout.model,
            set(map(layout.group_size, ENGINE_ROLES)),
            layout.hardware.device,
        ),
    }
    if layout.config.otlp_traces_endpoint:
        # SGLang's flag names the service, which is the same for all engines.
        given = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        env["OTEL_RESOURCE_ATTRIBUTES"] = f"{given},service.instance.id={node}".lstrip(",")
    if layout.hardware.device == "cpu":
        env |= {
            "SGLANG_PLATFORM": "dualpath_cpu",
            "SGLANG_DISABLE_CUDNN_CHECK": "1",
            "CUDA_VISIBLE_DEVICES": "",
            # Several engines share a CPU; with more threads each they fight for it.
            "OMP_NUM_THREADS": "1",
            **cpu_env(layout.passed_flags(node), layout.model),
        }
    return env


def engine_flags(layout: Layout, node: str, ports: Mapping[str, int]) -> list[str]:
    """SGLang's flags; the user's own come last, so they win."""
    ranks = layout.ranks(node)
    flags = {
        "--model-path": str(layout.model),
        "--served-model-name": served_model_name(layout.config),
        "--host": layout.places[node].bind,
        "--port": str(ports["http"]),
        "--nccl-port": str(ports["rendezvous"]),
        "--page-size": str(page_tokens(layout.model)),
        ROLE_FLAG: layout.places[node].role.value,
        "--disaggregation-transfer-backend": "mooncake",
        **_device_flags(layout, node),
    }
    if has_recurrent_layers(layout.model):
        # A decode engine takes a snapshot at the end of each block, of which it stores the last.
        flags["--mamba-track-interval"] = str(page_tokens(layout.model))
    if layout.config.otlp_traces_endpoint:
        flags["--otlp-traces-endpoint"] = layout.config.otlp_traces_endpoint
    if layout.config.rdma_devices:
        flags["--disaggregation-ib-device"] = layout.config.rdma_devices
    if ranks.meet:
        first = layout.engine_of(node)
        port = layout.port(first, "engine", meeting(ranks))
        flags["--dist-init-addr"] = f"{layout.hosts[first]}:{port}"
    if ranks.hosts > 1:
        flags["--node-rank"] = str(layout.places[node].rank)
    switches = ["--skip-server-warmup", "--enable-cache-report"]
    if layout.config.otlp_traces_endpoint:
        switches.append("--enable-trace")
    if ranks.groups == 1:  # else all groups wait for one that sleeps, a second
        switches.append("--sleep-on-idle")
    elif layout.hardware.device == "cpu":  # which has no such operator
        switches.append("--no-enable-tp-lm-head-all-to-all")
    if layout.places[node].role is Role.PREFILL:
        flags |= {
            # The first host opens it.
            BOOTSTRAP_FLAG: str(layout.port(layout.engine_of(node), "engine", BOOTSTRAP)),
            "--unified-cache-external-linker-backend": "dynamic",
            "--unified-cache-external-linker-config": json.dumps(_LINKER),
        }
        switches.append("--enable-unified-cache-external-linker")
    else:
        # Without cpu_tensor D keeps a second host pool of its own.
        flags["--disaggregation-decode-retraction-backup"] = "cpu_tensor"
        switches.append("--disaggregation-decode-enable-radix-cache")
    words = (word for pair in flags.items() for word in pair)
    return [*words, *switches, *layout.passed_flags(node)]


def _device_flags(layout: Layout, node: str) -> dict[str, str]:
    tokens = layout.config.max_total_tokens
    if layout.hardware.device == "cpu":
        flags = {"--device": "cpu", "--dtype": "float32"}
        if has_sparse_attention(layout.model):
            flags["--attention-backend"] = "dsa"  # by itself SGLang takes torch's dense one
        if has_compressed_attention(layout.model):
            flags["--attention-backend"] = "dsv4"
        if has_recurrent_layers(layout.model):
            # By itself SGLang gives their states a share of all memory.
            flags["--max-mamba-cache-size"] = str(CPU_STATE_SLOTS)
        tokens = tokens or CPU_POOL_TOKENS
    else:  # untested: no such machine was at hand (docs/gpu.md)
        flags = {"--base-gpu-id": str(layout.gpus(node)[0])}
        if (
            layout.places[node].role is Role.PREFILL
            and layout.config.prefill_layer_window is not None
        ):
            # A graph that is replayed writes latents ahead of any hook, free buffer or not.
            flags["--cuda-graph-backend-prefill"] = "disabled"
    return flags | ({"--max-total-tokens": str(tokens)} if tokens else {})
