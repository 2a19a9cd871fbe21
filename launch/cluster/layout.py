"""Where everything of a cluster is: nodes, hosts, ranks, ports and GPUs.

A *node* is one engine with its agent: ``p0`` and ``agent-p0``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from engine.refused import refused_flags
from launch.cluster.config import ClusterConfig
from launch.cluster.hardware import Hardware
from launch.cluster.ports import CONTROL, HTTP, block_ports, control
from launch.cluster.tensor_parallel import check_window, group_names, ranks_of
from launch.settings import BadConfig
from transfer.control.sockets import UNIX
from transfer.ports.source_filter import LOOPBACK as THIS_HOST
from transfer.ports.source_filter import parse

LOOPBACK = "127.0.0.1"
PAGE_TOKENS = 64

Role = Literal["prefill", "decode"]


def node_names(config: ClusterConfig) -> list[str]:
    """``p0 .. d0 ..``: an engine's name is its node's."""
    prefill = [f"p{i}" for i in range(config.prefill)]
    return prefill + [f"d{i}" for i in range(config.decode)]


def agent_name(node: str) -> str:
    return f"agent-{node}"


def role_of(node: str) -> Role:
    return "prefill" if node.startswith("p") else "decode"


class Layout:
    """Of one cluster. Raises ``BadConfig`` for engines that cannot be.

    ``hosts`` maps nodes to addresses; absent ones are on the loopback.
    """

    def __init__(
        self,
        config: ClusterConfig,
        model: Path,
        hardware: Hardware,
        hosts: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.hardware = hardware
        self.nodes = node_names(config)
        self.hosts = {node: (hosts or {}).get(node, LOOPBACK) for node in self.nodes}
        self.ranks = {node: ranks_of(self.passed_flags(node)) for node in self.nodes}
        for node in self.nodes:
            if reason := refused_flags(self.passed_flags(node)):
                raise BadConfig(f"{reason}: take it out.")
        if config.prefill_layer_window is not None:
            check_window(model, self.group_sizes("prefill"), self.group_sizes("decode"))
        self._ports_per_process = max(map(block_ports, self.ranks.values()))
        self.agents = {
            agent_name(node): self._endpoint(
                node, agent_name(node), self.port(node, "agent", CONTROL)
            )
            for node in self.nodes
        }
        """Name -> control endpoint."""
        self._check_gpus()

    def _neighbours(self, node: str) -> list[str]:
        """The nodes of its host, itself among them."""
        return [other for other in self.nodes if self.hosts[other] == self.hosts[node]]

    def group_sizes(self, role: Role) -> set[int]:
        """Over how many ranks the engines of one role split KV heads."""
        return {ranks.of_group for node, ranks in self.ranks.items() if role_of(node) == role}

    def port(self, node: str, kind: Literal["agent", "engine"], offset: int) -> int:
        """Port of the node's agent or engine, in its block of ports, numbered over its host."""
        block = 2 * self._neighbours(node).index(node) + (kind == "engine")
        return self.config.first_port + block * self._ports_per_process + offset

    def controls(self, node: str) -> list[str]:
        """Of each attention group of the node's engine."""
        ranks = self.ranks[node]
        return [
            self._endpoint(node, name, self.port(node, "engine", control(ranks, group)))
            for group, name in enumerate(self.engines(node))
        ]

    def engines(self, node: str) -> list[str]:
        """What the gateway and the agents call the attention groups of the node's engine."""
        return group_names(node, self.ranks[node])

    @property
    def is_one_host(self) -> bool:
        """Whether no process has anything to ask another host for."""
        return set(self.hosts.values()) == {LOOPBACK}

    def http(self, node: str) -> str:
        return f"http://{self.hosts[node]}:{self.port(node, 'engine', HTTP)}"

    def _endpoint(self, node: str, name: str, port: int) -> str:
        return f"{UNIX}{name}" if self.is_one_host else f"tcp://{self.hosts[node]}:{port}"

    @property
    def heard(self) -> list[str]:
        """Networks that ports of agents and engines hear; none: everyone. Raises ``BadConfig``."""
        more = self.config.peers_from
        if more == "any":
            return []
        try:
            networks = parse([*THIS_HOST, *self.hosts.values(), *(more.split(",") if more else ())])
        except ValueError as error:
            raise BadConfig(
                f"--peers-from {more}: {error}: give networks such as 10.1.0.0/16, or `any`."
            ) from error
        return list(dict.fromkeys(map(str, networks)))

    def gpus(self, node: str) -> list[int]:
        """Of a node's ranks: on each host one node's after the other's."""
        if self.hardware.device == "cpu":
            return []
        neighbours = self._neighbours(node)
        first = sum(self.ranks[n].total for n in neighbours[: neighbours.index(node)])
        return list(range(first, first + self.ranks[node].total))

    def _check_gpus(self) -> None:
        """This machine, where nodes are unless ``hosts`` says otherwise, has as many."""
        here = [node for node in self.nodes if self.hosts[node] == LOOPBACK]
        if self.hardware.gpus is None or any(map(self._places_itself, here)):
            return
        wanted = sum(self.ranks[node].total for node in here)
        if wanted > self.hardware.gpus:
            raise BadConfig(
                f"{len(here)} engines need {wanted} GPUs, and this machine shows "
                f"{self.hardware.gpus}: choose a smaller --prefill, --decode or --tp-size (in "
                "--engine-args), or look at CUDA_VISIBLE_DEVICES."
            )

    def _places_itself(self, node: str) -> bool:
        return any(flag.startswith("--base-gpu-id") for flag in self.passed_flags(node))

    def passed_flags(self, node: str) -> list[str]:
        """The user's own flags for the node's SGLang."""
        config = self.config
        role_args = config.prefill_args if role_of(node) == "prefill" else config.decode_args
        return [*config.engine_args, *role_args]
