"""Every process of a cluster as plain data, made from the settings by pure functions."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

from common.cluster.membership import EngineAddress
from common.experiment import Experiment
from engine.config import EngineConfig
from launch.cluster.config import ClusterConfig
from launch.cluster.engine_command import engine_env, engine_flags
from launch.cluster.hardware import Hardware
from launch.cluster.layout import LOOPBACK, Layout, agent_name, role_of
from launch.cluster.ports import BOOTSTRAP, CONTROL, HTTP, RENDEZVOUS, choices, mooncake_env
from launch.cluster.process_record import HealthCheck, ProcessRecord
from launch.cluster.tensor_parallel import EngineRanks
from launch.gateway.config import GatewayConfig, RequestLimits
from launch.gateway.doors.settings import DoorKeys, DoorSettings
from launch.settings import BadConfig, filled
from scheduler.options import SchedulerOptions
from storage.remote.settings import RemoteSettings
from transfer.agent.config import AgentConfig
from transfer.control.keys import SECRET_CHARS_MIN, BadSecret, Keys, read_secret
from transfer.control.senders import LAUNCHER
from transfer.traffic.classes import BadMarks, rdma_env


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
    records = _Records(Layout(config, model, hardware, hosts), environ)
    agents = [records.agent(node) for node in records.layout.nodes]
    engines = [records.engine(node) for node in records.layout.nodes]
    return [*agents, *engines, records.gateway()]


class _Records:
    """The records of one cluster."""

    def __init__(self, layout: Layout, environ: Mapping[str, str]) -> None:
        self.layout = layout
        self._engine_key = secrets.token_urlsafe(32)
        self._config = layout.config
        self._environ = environ
        self._secret = _cluster_secret(layout.config)
        self._keys = Keys(LAUNCHER, self._secret)

    def agent(self, node: str) -> ProcessRecord:
        name = agent_name(node)
        config = self._config
        settings = AgentConfig(
            name=name,
            control=self.layout.agents[name],
            host=self.layout.hosts[node],
            protocol=self.layout.hardware.transfer,
            engines=[name for other in self.layout.nodes for name in self.layout.engines(other)],
            control_secret=self._secret,
            heard=self.layout.heard,
            cgroup=config.traffic.cgroup,
            gpus=self.layout.gpus(node),
            ssd_dirs=[str(folder) for folder in config.ssd_folders_of(name)],
            remote=filled(RemoteSettings(), config),
            experiment=Experiment(zero_io=config.is_zero_io),
        )
        settings = filled(settings, config)
        alive = self._answers(self.layout.agents[name], name)
        return ProcessRecord(
            name=name,
            kind="agent",
            argv=(sys.executable, "-m", "transfer.agent"),
            env={
                # It moves host memory only: Mooncake's CUDA build would open a context on a GPU.
                "CUDA_VISIBLE_DEVICES": "",
                **self._mooncake_env("agent", self.layout.port(node, "agent", 0), ranks=1),
                **settings.to_env(),
            },
            secrets=settings.secrets(),
            host=self.layout.hosts[node],
            ports=self._control_ports(self.layout.port(node, "agent", CONTROL)),
            choices=choices(self.layout.port(node, "agent", 0), EngineRanks()),
            ready=(alive,),
            alive=alive,
            cgroup=config.traffic.cgroup,
        )

    def engine(self, node: str) -> ProcessRecord:
        role = role_of(node)
        config = self._config
        settings = EngineConfig(
            name=node,
            role=role,
            controls=self.layout.controls(node),
            agent=agent_name(node),
            agents=self.layout.agents,
            control_secret=self._secret,
            heard=self.layout.heard,
            prefill_quota_s=self._quota_s() if role == "prefill" else None,
            layer_window=config.prefill_layer_window if role == "prefill" else None,
            promise_planned_only=role == "decode" and config.prefill_layer_window is not None,
            experiment=config.experiment,
            http_key=self._engine_key,
        )
        settings = filled(settings, config)
        offsets = {"http": HTTP, "rendezvous": RENDEZVOUS}
        if role == "prefill":
            offsets["bootstrap"] = BOOTSTRAP
        ports = self._control_ports(self.layout.port(node, "engine", CONTROL))
        ports |= {
            name: self.layout.port(node, "engine", offset) for name, offset in offsets.items()
        }
        alive, *groups_alive = map(self._answers, settings.controls, self.layout.engines(node))
        return ProcessRecord(
            name=node,
            kind="engine",
            argv=(
                sys.executable,
                "-m",
                "sglang.launch_server",
                *engine_flags(self.layout, node, ports),
            ),
            env={
                **self._mooncake_env(
                    "engine", self.layout.port(node, "engine", 0), self.layout.ranks[node].total
                ),
                **engine_env(self.layout, node),
                **settings.to_env(),
            },
            secrets=settings.secrets(),
            host=self.layout.hosts[node],
            ports=ports,
            choices=choices(self.layout.port(node, "engine", 0), self.layout.ranks[node]),
            ready=(
                # Of any status: it has no key to this port, which opens with the model loaded.
                HealthCheck("http", f"{self.layout.http(node)}/model_info", any_status=True),
                alive,
                *groups_alive,
            ),
            alive=alive,
        )

    def gateway(self) -> ProcessRecord:
        config = self._config
        settings = GatewayConfig(
            host=config.host,
            port=config.port,
            agents=self.layout.agents,
            control_secret=self._secret,
            engines=[address for node in self.layout.nodes for address in self._addresses(node)],
            scheduler=filled(SchedulerOptions(), config),
            doors=filled(DoorSettings(), config),
            keys=filled(DoorKeys(engine_key=self._engine_key), config),
            limits=filled(RequestLimits(), config),
        )
        settings = filled(settings, config)
        reachable = LOOPBACK if config.host in ("0.0.0.0", "") else config.host
        scheme = "https" if config.ssl_certfile else "http"
        health = f"{scheme}://{reachable}:{config.port}/health"
        return ProcessRecord(
            name="gateway",
            kind="gateway",
            argv=(sys.executable, "-m", "launch.gateway"),
            env={
                **self._python_env(),
                **settings.to_env(),
            },
            secrets=settings.secrets(),
            host=config.host,
            ports={"http": config.port},
            ready=(HealthCheck("http", health),),
            # 503 while no engine is up: that is no reason to end the gateway.
            alive=HealthCheck("http", health, any_status=True),
        )

    def _answers(self, endpoint: str, server: str) -> HealthCheck:
        """At a control endpoint."""
        return HealthCheck("zmq", endpoint, server=server, keys=self._keys)

    def _control_ports(self, port: int) -> dict[str, int]:
        """None on one host, whose control connections are unix sockets."""
        return {} if self.layout.is_one_host else {"control": port}

    def _addresses(self, node: str) -> list[EngineAddress]:
        names = self.layout.engines(node)
        return [
            EngineAddress(
                name=name,
                role=role_of(node),
                agent=agent_name(node),
                http=self.layout.http(node),
                control=control,
                bootstrap_host=self.layout.hosts[node],
                group=group if len(names) > 1 else None,
            )
            for group, (name, control) in enumerate(
                zip(names, self.layout.controls(node), strict=True)
            )
        ]

    def _quota_s(self) -> float | None:
        quota_ms = self._config.prefill_quota_ms
        return None if quota_ms is None else quota_ms / 1000

    def _python_env(self) -> dict[str, str]:
        env = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.layout.model.is_absolute():
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
        if self.layout.hardware.transfer == "tcp":
            return env | {"MC_FORCE_TCP": "1", "MOONCAKE_PROTOCOL": "tcp"}
        try:
            return env | rdma_env(kind, self._config.traffic, self._environ)
        except BadMarks as error:
            raise BadConfig(f"{error}.") from error


def _cluster_secret(config: ClusterConfig) -> str:
    """From its file; a new one where one launcher owns every end."""
    if not config.cluster_secret_file:
        return secrets.token_hex(SECRET_CHARS_MIN)
    try:
        return read_secret(Path(config.cluster_secret_file).expanduser())
    except BadSecret as error:
        raise BadConfig(f"--cluster-secret-file {error}.") from error
