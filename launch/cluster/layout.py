"""Where everything of a cluster is: nodes, hosts, ranks, ports and GPUs.

A *node* is one engine with its agent: ``p0`` and ``agent-p0``. An engine over several hosts is
several nodes, each with a part of the ranks and an agent: ``p0`` with the first ranks, ``p0-1`` on
the second host.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from common.cluster.membership import Role
from engine.refused import refused_flags
from launch.cluster.config import ClusterConfig
from launch.cluster.hardware import Hardware
from launch.cluster.ports import CONTROL, HTTP, block_ports, control
from launch.cluster.tensor_parallel import (
    EngineRanks,
    check_kv_types,
    check_window,
    group_names,
    has_compressed_attention,
    ranks_of,
)
from launch.flags.node import NodeSettings
from launch.settings import BadConfig
from transfer.control.sockets import UNIX
from transfer.ports.source_filter import LOOPBACK as THIS_HOST
from transfer.ports.source_filter import parse

LOOPBACK = "127.0.0.1"
EVERY_ADDRESS = "0.0.0.0"
PAGE_TOKENS = 64
_COMPRESSED_PAGE_TOKENS = 256
ENGINE_ROLES = (Role.PREFILL, Role.DECODE)


def page_tokens(model: Path) -> int:
    """Tokens of a page, and so of a block: DeepSeek-V4's kernels take no other."""
    return _COMPRESSED_PAGE_TOKENS if has_compressed_attention(model) else PAGE_TOKENS


def node_names(config: ClusterConfig) -> list[str]:
    """``p0 .. d0 ..``: an engine's name is its node's."""
    prefill = [f"p{i}" for i in range(config.prefill)]
    return prefill + [f"d{i}" for i in range(config.decode)]


def agent_name(node: str) -> str:
    return f"agent-{node}"


class Place(NamedTuple):
    """A node, and the host that it is on."""

    role: Role
    host: str = LOOPBACK
    """Address that others reach it at."""
    listens_on: str = ""
    """Address of its control and HTTP ports; empty: the one above."""
    engine: str = ""
    """Whose further host it is; empty: it has an engine's first ranks, and the engine its name."""
    rank: int = 0
    """Which of the engine's hosts it is: SGLang's ``--node-rank``."""
    is_elsewhere: bool = False
    """Another launcher runs it."""

    @property
    def bind(self) -> str:
        return self.listens_on or self.host

    @property
    def local(self) -> str:
        """Address that its own host reaches it at."""
        return LOOPBACK if self.bind == EVERY_ADDRESS else self.bind


def places_of(config: ClusterConfig, hosts: Mapping[str, str] | None = None) -> dict[str, Place]:
    """``hosts`` maps nodes to addresses; absent ones are on the loopback."""
    names = node_names(config)
    roles = {name: Role.PREFILL if name.startswith("p") else Role.DECODE for name in names}
    places = {name: Place(roles[name]) for name in names}
    for name, role in roles.items():
        for rank in range(1, _ranks_of(config, role).hosts):
            places[f"{name}-{rank}"] = Place(role, engine=name, rank=rank)
    return {
        name: place._replace(host=(hosts or {}).get(name, LOOPBACK))
        for name, place in places.items()
    }


class Layout:
    """Of one cluster, or of one host's part of it. Raises ``BadConfig`` for engines that cannot
    be."""

    def __init__(
        self,
        config: NodeSettings,
        model: Path,
        hardware: Hardware,
        places: Mapping[str, Place],
    ) -> None:
        self.config = config
        self.model = model
        self.hardware = hardware
        self.places = places
        self.nodes = list(places)
        self.hosts = {node: place.host for node, place in places.items()}
        self._ranks_of_role = {role: _ranks_of(config, role) for role in ENGINE_ROLES}
        check_kv_types(*(_flags_of(config, role) for role in ENGINE_ROLES))
        if config.prefill_layer_window is not None:
            sizes = (self.group_size(role) for role in ENGINE_ROLES)
            check_window(model, *sizes)
        self._ports_per_process = max(map(block_ports, self._ranks_of_role.values()))
        self.agents = {
            agent_name(node): self._endpoint(
                self.hosts[node], agent_name(node), self.port(node, "agent", CONTROL)
            )
            for node in self.nodes
        }
        """Name -> control endpoint."""
        self._check_gpus()

    def engine_of(self, node: str) -> str:
        """Name of the engine of which the node has ranks."""
        return self.places[node].engine or node

    def ranks(self, node: str) -> EngineRanks:
        """Of its engine, wherever they are."""
        return self._ranks_of_role[self.places[node].role]

    def group_size(self, role: Role) -> int:
        """Over how many ranks the engines of one role split KV heads, wherever they are: all are
        started with the same flags."""
        return self._ranks_of_role[role].of_group

    def _neighbours(self, node: str) -> list[str]:
        """The nodes of its host, itself among them."""
        return [other for other in self.nodes if self.hosts[other] == self.hosts[node]]

    def port(self, node: str, kind: Literal["agent", "engine"], offset: int) -> int:
        """Port of the node's agent or engine, in its block of ports, numbered over its host."""
        block = 2 * self._neighbours(node).index(node) + (kind == "engine")
        return self.config.first_port + block * self._ports_per_process + offset

    def controls(self, node: str, host: str) -> list[str]:
        """Of each attention group of the node's engine, by an address of its host: there the first
        rank answers that the group has here."""
        ranks = self.ranks(node)
        return [
            self._endpoint(host, name, self.port(node, "engine", control(ranks, group)))
            for group, name in enumerate(group_names(node, ranks))
        ]

    def agent_control(self, node: str, host: str) -> str:
        """Of the node's agent, likewise."""
        return self._endpoint(host, agent_name(node), self.port(node, "agent", CONTROL))

    def engines(self, node: str) -> list[str]:
        """What the gateway and the agents call the attention groups of the node's engine."""
        is_reader = self.places[node].role is Role.READER
        return [] if is_reader else group_names(self.engine_of(node), self.ranks(node))

    @property
    def is_one_host(self) -> bool:
        """Whether no process has anything to ask another host for."""
        return self.config.is_whole_cluster and set(self.hosts.values()) == {LOOPBACK}

    def http(self, node: str, host: str) -> str:
        """Of the node's engine."""
        return f"http://{host}:{self.port(node, 'engine', HTTP)}"

    def _endpoint(self, host: str, name: str, port: int) -> str:
        return f"{UNIX}{name}" if self.is_one_host else f"tcp://{host}:{port}"

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
        """Of the ranks that a node has: on each host one node's after the other's."""
        if self.hardware.device == "cpu" or self.places[node].role is Role.READER:
            return []
        neighbours = self._neighbours(node)
        first = sum(self.ranks(n).of_host for n in neighbours[: neighbours.index(node)])
        return list(range(first, first + self.ranks(node).of_host))

    def _check_gpus(self) -> None:
        """This machine, where nodes are unless they are told where, has as many."""
        are_here = not self.config.is_whole_cluster
        here = [
            node
            for node, place in self.places.items()
            if place.role is not Role.READER
            and not place.is_elsewhere
            and (are_here or place.host == LOOPBACK)
        ]
        flags = map(self.passed_flags, here)
        if self.hardware.gpus is None or any(map(_places_itself, flags)):
            return
        wanted = sum(self.ranks(node).of_host for node in here)
        if wanted > self.hardware.gpus:
            raise BadConfig(
                f"{len(here)} engines need {wanted} GPUs, and this machine shows "
                f"{self.hardware.gpus}: choose a smaller --prefill, --decode or --tp-size (in "
                "--engine-args), or look at CUDA_VISIBLE_DEVICES."
            )

    def passed_flags(self, node: str) -> list[str]:
        """The user's own flags for the node's SGLang."""
        return _flags_of(self.config, self.places[node].role)


def _ranks_of(config: NodeSettings, role: Role) -> EngineRanks:
    if reason := refused_flags(_flags_of(config, role)):
        raise BadConfig(f"{reason}: take it out.")
    return ranks_of(_flags_of(config, role))


def _flags_of(config: NodeSettings, role: Role) -> list[str]:
    role_args = config.prefill_args if role is Role.PREFILL else config.decode_args
    return [*config.engine_args, *role_args]


def _places_itself(flags: list[str]) -> bool:
    return any(flag.startswith("--base-gpu-id") for flag in flags)
