"""Every process of a cluster as plain data, made from the settings by pure functions.

A *node* is one engine with its agent: ``p0`` and ``agent-p0``.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import engine.engine_config
import launch.gateway_config
import transfer.agent_config
from engine.engine_config import EngineConfig
from launch.config import ClusterConfig
from launch.gateway_config import EngineAddress, GatewayConfig
from launch.hardware import Hardware
from launch.ports import (
    BOOTSTRAP,
    BOOTSTRAP_FLAG,
    CONTROL,
    HTTP,
    RENDEZVOUS,
    block_ports,
    control,
    meeting,
    mooncake_env,
)
from launch.process_record import HealthCheck, ProcessRecord
from launch.settings import BadConfig
from launch.tensor_parallel import (
    check_window,
    cpu_env,
    group_names,
    ranks_of,
    staging_env,
)
from scheduler.options import LoadPolicy, SchedulerOptions
from storage.owners import read_quotas
from storage.remote_settings import RemoteSettings
from storage.settings import to_env
from transfer.agent_config import AgentConfig
from transfer.traffic.classes import BadMarks, rdma_env

LOOPBACK = "127.0.0.1"
PAGE_TOKENS = 64
CPU_POOL_TOKENS = 65536

_LINKER = {
    "linker": "PrefillLinker",
    "linker_module_path": "engine.prefill_linker",
    "linker_extra_config": {},
}


def process_records(
    config: ClusterConfig,
    model: Path,
    hardware: Hardware,
    hosts: Mapping[str, str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> list[ProcessRecord]:
    """Agents, engines and gateway of a cluster, in that order.

    ``model`` is an absolute folder, or a relative path that is a hub's name.
    ``hosts`` maps nodes (``p0``, ``d1``) to addresses; absent ones are on the loopback.
    ``environ`` is what the processes will have besides, of which some is refused:
    :class:`BadConfig`.
    """
    nodes = node_names(config)
    where = {node: (hosts or {}).get(node, LOOPBACK) for node in nodes}
    cluster = _Cluster(config, model, hardware, nodes, where, environ)
    agents = [cluster.agent(node) for node in nodes]
    engines = [cluster.engine(node) for node in nodes]
    return [*agents, *engines, cluster.gateway()]


def node_names(config: ClusterConfig) -> list[str]:
    """``p0 .. d0 ..``: an engine's name is its node's."""
    prefill = [f"p{i}" for i in range(config.prefill)]
    return prefill + [f"d{i}" for i in range(config.decode)]


def agent_name(node: str) -> str:
    return f"agent-{node}"


def served_model_name(config: ClusterConfig) -> str:
    """``--served-model-name``, or the model's own name."""
    if config.served_model_name:
        return config.served_model_name
    return {"default": "SmolLM2-135M-Instruct"}.get(config.model, Path(config.model).name)


class _Cluster:
    """What all the records of one cluster share."""

    def __init__(
        self,
        config: ClusterConfig,
        model: Path,
        hardware: Hardware,
        nodes: list[str],
        hosts: Mapping[str, str],
        environ: Mapping[str, str],
    ) -> None:
        self.config = config
        self.model = model
        self.hardware = hardware
        self.nodes = nodes
        self.hosts = hosts
        self.environ = environ
        self.ranks = {node: ranks_of(self._passed_flags(node)) for node in nodes}
        if config.layer_window:
            check_window(model, self._group_sizes("prefill"), self._group_sizes("decode"))
        self.ports_per_process = max(map(block_ports, self.ranks.values()))
        self.agents = {
            agent_name(node): self._endpoint(node, self._port(node, "agent", CONTROL))
            for node in nodes
        }

    def agent(self, node: str) -> ProcessRecord:
        name = agent_name(node)
        config = self.config
        settings = AgentConfig(
            name=name,
            control=self.agents[name],
            host=self.hosts[node],
            protocol=self.hardware.transfer,
            rdma_devices=config.rdma_devices,
            cgroup=config.traffic_settings.cgroup,
            gpus=self._gpus(node),
            pace=config.kv_pace,
            nic_bytes_per_s=config.nic_bytes_per_s,
            dram_bytes=config.dram_bytes,
            ssd_dirs=[str(folder / name) for folder in config.ssd_folders if config.ssd_bytes],
            ssd_bytes=config.ssd_bytes,
            ssd_min_free_bytes=config.ssd_min_free_bytes,
            ssd_quotas=read_quotas(config.ssd_quotas),
            write_policy=config.write_policy,
            promotion_policy=config.promotion_policy,
            remote_url=config.remote,
            remote_options=config.remote_options,
            remote=RemoteSettings(
                capacity_bytes=config.remote_bytes,
                ttl_s=config.remote_ttl_s,
                hedge_after_s=config.remote_hedge_s,
            ),
        )
        alive = HealthCheck("zmq", self.agents[name])
        return ProcessRecord(
            name=name,
            kind="agent",
            argv=(sys.executable, "-m", "transfer.agent"),
            env={
                **self._mooncake_env("agent", self._port(node, "agent", 0), ranks=1),
                transfer.agent_config.VARIABLE: to_env(settings),
            },
            host=self.hosts[node],
            ports={"control": self._port(node, "agent", CONTROL)},
            ready=(alive,),
            alive=alive,
            cgroup=config.traffic_settings.cgroup,
        )

    def engine(self, node: str) -> ProcessRecord:
        role = _role(node)
        settings = EngineConfig(
            name=node,
            role=role,
            controls=self._controls(node),
            agent=agent_name(node),
            agents=self.agents,
            deliver_timeout_s=self.config.deliver_timeout_s,
            prefill_quota_s=self._quota_s() if role == "prefill" else None,
            layer_window=self.config.layer_window if role == "prefill" else 0,
            promise_planned_only=role == "decode" and bool(self.config.layer_window),
            poison_kv=self.config.poison_kv,
        )
        offsets = {"control": CONTROL, "http": HTTP, "rendezvous": RENDEZVOUS}
        if role == "prefill":
            offsets["bootstrap"] = BOOTSTRAP
        ports = {name: self._port(node, "engine", offset) for name, offset in offsets.items()}
        alive, *groups_alive = (HealthCheck("zmq", control) for control in settings.controls)
        return ProcessRecord(
            name=node,
            kind="engine",
            argv=(sys.executable, "-m", "sglang.launch_server", *self._engine_flags(node, ports)),
            env={
                **self._mooncake_env(
                    "engine", self._port(node, "engine", 0), self.ranks[node].total
                ),
                **self._engine_env(node),
                engine.engine_config.VARIABLE: to_env(settings),
            },
            host=self.hosts[node],
            ports=ports,
            ready=(HealthCheck("http", f"{self._http(node)}/model_info"), alive, *groups_alive),
            alive=alive,
            after=tuple(self.agents),
        )

    def gateway(self) -> ProcessRecord:
        config = self.config
        settings = GatewayConfig(
            host=config.host,
            port=config.port,
            agents=self.agents,
            engines=[address for node in self.nodes for address in self._addresses(node)],
            model=str(self.model),
            served_model_name=served_model_name(config),
            path_policy=config.path_policy,
            scheduler=SchedulerOptions(
                load_policy=cast(LoadPolicy, config.load_policy),
                alpha_bytes=config.alpha_bytes,
                beta_tokens=config.beta_tokens,
            ),
            requests_max=config.requests_max,
            read_timeout_s=config.read_timeout_s,
            request_timeout_s=config.request_timeout_s,
        )
        reachable = LOOPBACK if config.host in ("0.0.0.0", "") else config.host
        health = f"http://{reachable}:{config.port}/health"
        return ProcessRecord(
            name="gateway",
            kind="gateway",
            argv=(sys.executable, "-m", "launch.gateway"),
            env={
                **self._python_env(),
                # It tokenizes, and computes nothing on a device.
                "CUDA_VISIBLE_DEVICES": "",
                launch.gateway_config.VARIABLE: to_env(settings),
            }
            | ({"SGLANG_PLATFORM": "dualpath_cpu"} if self.hardware.device == "cpu" else {}),
            host=config.host,
            ports={"http": config.port},
            ready=(HealthCheck("http", health),),
            # 503 while no engine is up: that is no reason to end the gateway.
            alive=HealthCheck("http", health, any_status=True),
        )

    def _addresses(self, node: str) -> list[EngineAddress]:
        names = group_names(node, self.ranks[node])
        return [
            EngineAddress(
                name=name,
                role=_role(node),
                agent=agent_name(node),
                http=self._http(node),
                control=control,
                bootstrap_host=self.hosts[node],
                group=group if len(names) > 1 else None,
            )
            for group, (name, control) in enumerate(zip(names, self._controls(node), strict=True))
        ]

    def _group_sizes(self, role: str) -> set[int]:
        """Over how many ranks the engines of one role split KV heads."""
        return {ranks.of_group for node, ranks in self.ranks.items() if _role(node) == role}

    def _quota_s(self) -> float | None:
        quota_ms = self.config.prefill_quota_ms
        return None if quota_ms is None else quota_ms / 1000

    def _port(self, node: str, kind: str, offset: int) -> int:
        block = 2 * self.nodes.index(node) + (kind == "engine")
        return self.config.first_port + block * self.ports_per_process + offset

    def _endpoint(self, node: str, port: int) -> str:
        return f"tcp://{self.hosts[node]}:{port}"

    def _controls(self, node: str) -> list[str]:
        """Of each attention group of the node's engine."""
        ranks = self.ranks[node]
        offsets = [control(ranks, group) for group in range(ranks.groups)]
        return [self._endpoint(node, self._port(node, "engine", offset)) for offset in offsets]

    def _http(self, node: str) -> str:
        return f"http://{self.hosts[node]}:{self._port(node, 'engine', HTTP)}"

    def _python_env(self) -> dict[str, str]:
        env = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.model.is_absolute():
            env["HF_HUB_OFFLINE"] = "1"
        return env

    def _mooncake_env(self, kind: str, block_port: int, ranks: int) -> dict[str, str]:
        env = self._python_env() | {
            **mooncake_env(block_port, ranks),
            # The defaults are 30 s: a hung peer would hold a forward for as long.
            "MC_TRANSFER_TIMEOUT": "15",
            "MC_TCP_PROGRESS_TIMEOUT_SEC": "5",
            "MC_TCP_STATUS_TIMEOUT_SEC": "5",
        }
        if self.hardware.transfer == "tcp":
            return env | {"MC_FORCE_TCP": "1", "MOONCAKE_PROTOCOL": "tcp"}
        try:
            return env | rdma_env(kind, self.config.traffic_settings, self.environ)
        except BadMarks as error:
            raise BadConfig(f"{error}.") from error

    def _engine_env(self, node: str) -> dict[str, str]:
        env = {
            "SGLANG_HOST_IP": self.hosts[node],
            # Pages of an aborted request stay held until P can no longer write to them.
            "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE": "1",
            "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "2",
            # P sends nothing to a D that failed once until a probe finds it: by default after
            # 30 s at first, minutes later on, for a D that was suspended for a moment.
            "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S": "1",
            "SGLANG_FAILED_SESSION_PROBE_MAX_INTERVAL_S": "4",
            "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
            # What P has cached and D lacks leaves with the rest, layer by layer.
            "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX": "0",
            **staging_env(
                self.model,
                self._group_sizes("prefill") | self._group_sizes("decode"),
                self.hardware.device,
            ),
        }
        if self.hardware.device == "cpu":
            env |= {
                "SGLANG_PLATFORM": "dualpath_cpu",
                "SGLANG_DISABLE_CUDNN_CHECK": "1",
                "CUDA_VISIBLE_DEVICES": "",
                # Several engines share a CPU; with more threads each they fight for it.
                "OMP_NUM_THREADS": "1",
                **cpu_env(self.ranks[node]),
            }
        return env

    def _engine_flags(self, node: str, ports: Mapping[str, int]) -> list[str]:
        config = self.config
        flags = {
            "--model-path": str(self.model),
            "--served-model-name": served_model_name(config),
            "--host": self.hosts[node],
            "--port": str(ports["http"]),
            "--nccl-port": str(ports["rendezvous"]),
            "--page-size": str(PAGE_TOKENS),
            "--disaggregation-mode": _role(node),
            "--disaggregation-transfer-backend": "mooncake",
        }
        if config.rdma_devices:
            flags["--disaggregation-ib-device"] = config.rdma_devices
        if self.ranks[node].groups > 1:
            port = self._port(node, "engine", meeting(self.ranks[node]))
            flags["--dist-init-addr"] = f"{self.hosts[node]}:{port}"
        tokens = config.max_total_tokens
        if self.hardware.device == "cpu":
            flags |= {"--device": "cpu", "--dtype": "float32"}
            tokens = tokens or CPU_POOL_TOKENS
        else:  # untested: no such machine was at hand
            flags["--base-gpu-id"] = str(self._gpus(node)[0])
        if tokens:
            flags["--max-total-tokens"] = str(tokens)
        switches = ["--skip-server-warmup", "--enable-cache-report"]
        if self.ranks[node].groups == 1:  # else all groups wait for one that sleeps, a second
            switches.append("--sleep-on-idle")
        elif self.hardware.device == "cpu":  # which has no such operator
            switches.append("--no-enable-tp-lm-head-all-to-all")
        if _role(node) == "prefill":
            flags |= {
                BOOTSTRAP_FLAG: str(ports["bootstrap"]),
                "--unified-cache-external-linker-backend": "dynamic",
                "--unified-cache-external-linker-config": json.dumps(_LINKER),
            }
            switches.append("--enable-unified-cache-external-linker")
        else:
            # Without cpu_tensor D keeps a second host pool of its own.
            flags["--disaggregation-decode-retraction-backup"] = "cpu_tensor"
            switches.append("--disaggregation-decode-enable-radix-cache")
        return [
            *(word for pair in flags.items() for word in pair),
            *switches,
            *self._passed_flags(node),
        ]

    def _gpus(self, node: str) -> list[int]:
        """Of a node's ranks: one after the other, as all nodes are on one machine."""
        if self.hardware.device == "cpu":
            return []
        first = sum(self.ranks[other].total for other in self.nodes[: self.nodes.index(node)])
        return list(range(first, first + self.ranks[node].total))

    def _passed_flags(self, node: str) -> list[str]:
        """The user's own flags for SGLang."""
        config = self.config
        role_args = config.prefill_args if _role(node) == "prefill" else config.decode_args
        return [*shlex.split(config.engine_args), *shlex.split(role_args)]


def _role(node: str) -> str:
    return "prefill" if node.startswith("p") else "decode"
