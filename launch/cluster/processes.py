"""Every process of a cluster as plain data, made from the settings by pure functions."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from common.cluster.membership import EngineAddress, Role
from common.experiment import Experiment
from engine.config import EngineConfig
from engine.cpu.fork_server import COMMAND
from launch.cluster.config import ClusterConfig
from launch.cluster.engine_command import engine_env, engine_flags
from launch.cluster.hardware import Hardware
from launch.cluster.layout import EVERY_ADDRESS, LOOPBACK, Layout, agent_name, places_of
from launch.cluster.ports import BOOTSTRAP, CONTROL, HTTP, RENDEZVOUS, choices, mooncake_env
from launch.cluster.process_record import HealthCheck, ProcessRecord
from launch.cluster.tensor_parallel import EngineRanks
from launch.flags.gateway import gateway_settings
from launch.flags.shared import cluster_secret
from launch.settings import BadConfig, filled
from storage.remote.settings import RemoteSettings
from transfer.agent.config import AgentConfig
from transfer.control.keys import (
    ENGINE_HTTP,
    Keys,
    derived,
)
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
    ``hosts`` maps nodes (``p0``, ``d1``; ``p0-1``: the second host of an engine over several) to
    addresses; absent ones are on the loopback.
    ``environ`` is what the processes will have besides, of which some is refused:
    :class:`BadConfig`.
    """
    layout = Layout(config, model, hardware, places_of(config, hosts))
    records = Records(layout, cluster_secret(config), environ)
    agents = [records.agent(node) for node in layout.nodes]
    engines = [records.engine(node) for node in layout.nodes]
    addresses = [address for node in layout.nodes for address in records.addresses(node)]
    return [*agents, *engines, gateway_record(config, records, addresses)]


class Records:
    """The records of the nodes of one layout."""

    def __init__(
        self,
        layout: Layout,
        secret: str,
        environ: Mapping[str, str],
        agents: Mapping[str, str] = MappingProxyType({}),
        engines: Sequence[str] = (),
    ) -> None:
        """``agents`` (with their control endpoints) and ``engines``: that are elsewhere."""
        self.layout = layout
        self.secret = secret
        self.engine_key = derived(secret, ENGINE_HTTP)
        self._config = layout.config
        self._environ = environ
        self._keys = Keys(LAUNCHER, secret)
        self._agents = {**layout.agents, **agents}
        here = (name for node in layout.nodes for name in layout.engines(node))
        self._engines = list(dict.fromkeys([*engines, *here]))

    def agent(self, node: str) -> ProcessRecord:
        name = agent_name(node)
        config = self._config
        settings = AgentConfig(
            name=name,
            control=self.layout.agent_control(node, self.layout.places[node].bind),
            host=self.layout.hosts[node],
            protocol=self.layout.hardware.transfer,
            engines=self._engines,
            control_secret=self.secret,
            heard=self.layout.heard,
            cgroup=config.traffic.cgroup,
            gpus=self.layout.gpus(node),
            ssd_dirs=[str(folder) for folder in config.ssd_folders_of(name)],
            remote=filled(RemoteSettings(), config),
            experiment=Experiment(zero_io=config.is_zero_io),
            otlp_traces_endpoint=config.otlp_traces_endpoint,
        )
        settings = filled(settings, config)
        local = self.layout.places[node].local
        alive = self._answers(self.layout.agent_control(node, local), name)
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
            host=self.layout.places[node].bind,
            ports=self._control_ports(self.layout.port(node, "agent", CONTROL)),
            choices=choices(self.layout.port(node, "agent", 0), EngineRanks()),
            ready=(alive,),
            alive=alive,
            cgroup=config.traffic.cgroup,
        )

    def engine(self, node: str) -> ProcessRecord:
        """The ranks of an engine that the node has."""
        layout, place, ranks = self.layout, self.layout.places[node], self.layout.ranks(node)
        settings = self._engine_settings(node)
        offsets = {"http": HTTP, "rendezvous": RENDEZVOUS}
        if place.role is Role.PREFILL and not place.rank:
            offsets["bootstrap"] = BOOTSTRAP
        ports = self._control_ports(layout.port(node, "engine", CONTROL))
        ports |= {name: layout.port(node, "engine", offset) for name, offset in offsets.items()}
        controls, names = layout.controls(node, place.local), layout.engines(node)
        alive, *others_alive = [
            self._answers(controls[group], names[group]) for group in ranks.groups_at(place.rank)
        ]
        http = f"{layout.http(node, place.local)}/model_info"
        return ProcessRecord(
            name=node,
            kind="engine",
            argv=(*COMMAND, *engine_flags(layout, node, ports)),
            env={
                **self._mooncake_env("engine", layout.port(node, "engine", 0), ranks.total),
                **engine_env(layout, node),
                **settings.to_env(),
            },
            secrets=settings.secrets(),
            host=place.bind,
            ports=ports,
            choices=choices(layout.port(node, "engine", 0), ranks),
            # Of any status: it has no key to this port, which opens with the model loaded.
            ready=(HealthCheck("http", http, any_status=True), alive, *others_alive),
            alive=alive,
            is_forked=layout.hardware.device == "cpu",
            together=layout.engine_of(node) if ranks.hosts > 1 else "",
        )

    def _engine_settings(self, node: str) -> EngineConfig:
        layout, config, place = self.layout, self._config, self.layout.places[node]
        role = place.role
        settings = EngineConfig(
            name=layout.engine_of(node),
            role=role.value,
            controls=layout.controls(node, place.bind),
            agent=agent_name(node),
            agents=self._agents,
            control_secret=self.secret,
            heard=layout.heard,
            prefill_quota_s=self._quota_s() if role is Role.PREFILL else None,
            layer_window=config.prefill_layer_window if role is Role.PREFILL else None,
            promise_planned_only=role is Role.DECODE and config.prefill_layer_window is not None,
            experiment=config.experiment,
            spanned_from=place.host if layout.ranks(node).hosts > 1 else "",
            http_key=self.engine_key,
        )
        return filled(settings, config)

    def _answers(self, endpoint: str, server: str) -> HealthCheck:
        """At a control endpoint."""
        return HealthCheck("zmq", endpoint, server=server, keys=self._keys)

    def _control_ports(self, port: int) -> dict[str, int]:
        """None on one host, whose control connections are unix sockets."""
        return {} if self.layout.is_one_host else {"control": port}

    def addresses(self, node: str) -> list[EngineAddress]:
        """Where others reach the engine whose first rank the node has, or the attention groups; a
        reader has none."""
        layout, place = self.layout, self.layout.places[node]
        if place.role is Role.READER:
            return []
        names, controls = layout.engines(node), layout.controls(node, place.host)
        first = layout.engine_of(node)  # which alone has SGLang's front door
        return [
            EngineAddress(
                name=names[group],
                role=place.role.value,
                agent=agent_name(node),
                http=layout.http(first, layout.hosts[first]),
                control=controls[group],
                bootstrap_host=layout.hosts[first],
                group=group if len(names) > 1 else None,
            )
            for group in layout.ranks(node).led_at(place.rank)
        ]

    def _quota_s(self) -> float | None:
        quota_ms = self._config.prefill_quota_ms
        return None if quota_ms is None else quota_ms / 1000

    def _mooncake_env(self, kind: str, block_port: int, ranks: int) -> dict[str, str]:
        env = python_env(self.layout.model) | {
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


def python_env(model: Path) -> dict[str, str]:
    """Of every process."""
    env = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    return env | ({"HF_HUB_OFFLINE": "1"} if model.is_absolute() else {})


def gateway_record(
    config: ClusterConfig, records: Records, engines: list[EngineAddress]
) -> ProcessRecord:
    """Of the gateway of what one command starts."""
    layout = records.layout
    settings = gateway_settings(config, records.secret, layout.agents, engines)
    reachable = LOOPBACK if config.host in (EVERY_ADDRESS, "") else config.host
    scheme = "https" if config.ssl_certfile else "http"
    health = f"{scheme}://{reachable}:{config.port}/health"
    return ProcessRecord(
        name="gateway",
        kind="gateway",
        argv=(sys.executable, "-m", "launch.gateway"),
        env={**python_env(layout.model), **settings.to_env()},
        secrets=settings.secrets(),
        host=config.host,
        ports={"http": config.port},
        ready=(HealthCheck("http", health),),
        # 503 while no engine is up: that is no reason to end the gateway.
        alive=HealthCheck("http", health, any_status=True),
    )
