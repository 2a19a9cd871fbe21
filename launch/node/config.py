"""Every setting of ``python -m launch.node``, each declared once (:mod:`launch.settings`)."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.cluster.membership import Role
from common.json import JsonObject
from launch import settings
from launch.flags.forms import URLS
from launch.flags.node import NodeSettings, check_node
from launch.flags.shared import check_numbers
from launch.settings import (
    SECONDS,
    BadConfig,
    check_choices,
    choice,
    integer,
    load_file,
    load_settings,
    parsed,
    require,
    setting,
    text,
)

EVERYBODY = "all"
"""Section of a profile that is for nodes of every role."""
ROLES = tuple(role.value for role in Role)
POOLS = "pools"
"""How many nodes there are of each kind: for whoever starts them (:mod:`launch.ray.profile`)."""


@dataclass(frozen=True)
class JoinSettings:
    """What a node is to a cluster."""

    join: tuple[str, ...] = setting(
        (),
        "URL of the gateway, or URLs of several, comma-separated, of which the first that answers "
        "is joined.",
        URLS,
    )
    role: str = setting("", "What the node is for; a reader is an agent alone.", choice(ROLES))
    name: str = setting(
        "", "Name of the node, such as p0; empty means the first that is free.", text("NAME")
    )
    profile: str = setting(
        "",
        "YAML or TOML file of settings for the nodes of a cluster, in sections `all`, `prefill`, "
        "`decode`, `reader`; flags and --config win.",
        text("FILE"),
    )
    host: str = setting(
        "",
        "Address of this host that the other hosts reach; empty means SGLANG_HOST_IP, or the one "
        "that leads to the gateway.",
        text("HOST"),
    )
    bind_host: str = setting(
        "",
        "Address that control and HTTP ports listen on, such as 0.0.0.0; empty means --host.",
        text("HOST"),
    )
    nnodes: int = setting(
        1,
        "Hosts over which the engine's ranks are spread, each a node of its own, with the same "
        "--name (docs/ranks.md).",
        integer("N"),
    )
    node_rank: int = setting(0, "Which of them this host is; 0 has the first ranks.", integer("N"))
    dist_init_addr: str = setting(
        "",
        "Where the ranks of several hosts meet: a port of host 0, and the 13 that follow it.",
        text("HOST:PORT"),
    )
    drain_timeout_s: float = setting(
        120.0,
        "After SIGTERM, requests and writes to storage have so long to finish.",
        SECONDS,
    )
    ready_file: str = setting(
        "",
        "File that is there while all of the node's processes serve and it does not drain, for "
        "whoever has started it to look at.",
        text("FILE"),
    )


@dataclass(frozen=True)
class NodeConfig(NodeSettings, JoinSettings):
    """What the user asked for. Build with :func:`load_config`, which also checks it."""

    def __post_init__(self) -> None:
        require(bool(self.role), f"--role is needed: choose one of {', '.join(ROLES)}.")
        check_choices(self)
        check_numbers(self)
        check_node(self)
        require(bool(self.join), "--join is needed: give the URL of the gateway.")
        require(
            bool(self.cluster_secret_file),
            "--cluster-secret-file is needed: give the file that the gateway was given.",
        )
        require(
            re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]{0,31}", self.name or "x") is not None,
            f"--name {self.name}: give letters, digits, - and _, 32 at most.",
        )

        self._check_hosts()

    def _check_hosts(self) -> None:
        n, rank = self.nnodes, self.node_rank
        require(n >= 1, f"--nnodes {n}: give 1 or more.")
        require(0 <= rank < n, f"--node-rank {rank}: give a number below --nnodes {n}.")
        require(n == 1 or self.role != Role.READER.value, "--nnodes: a reader has no engine.")
        require(n == 1 or bool(self.name), "--nnodes needs --name: the engine's, at all its hosts.")
        host, _, port = self.dist_init_addr.rpartition(":")
        require(
            n == 1 or bool(host) and port.isdigit(),
            "--nnodes needs --dist-init-addr: give the address of host 0 and a port of it, such as "
            "10.0.0.1:29400.",
        )

    @property
    def node(self) -> str:
        """Of several hosts of an engine each has a name of its own."""
        return f"{self.name}-{self.node_rank}" if self.node_rank else self.name

    @property
    def is_whole_cluster(self) -> bool:
        return False

    @property
    def log_name(self) -> str:
        return self.node


def load_config(argv: Sequence[str]) -> NodeConfig:
    """Flags over file over profile over defaults; raises :class:`~launch.settings.BadConfig`."""
    parser = make_parser()
    known, _ = parser.parse_known_args(list(argv))
    profile = getattr(known, "profile", "")
    given = read_profile(Path(profile).expanduser(), getattr(known, "role", "")) if profile else {}
    return load_settings(NodeConfig, parser, argv, given_else=given)


def read_profile(path: Path, role: str) -> JsonObject:
    """The settings that are for nodes of a role."""
    return profile_settings(load_file(path, "--profile") or {}, role, f"--profile {path}")


def profile_settings(sections: object, role: str, where: str) -> JsonObject:
    """Likewise, in what a profile says."""
    if not isinstance(sections, dict) or not sections.keys() <= {EVERYBODY, POOLS, *ROLES}:
        raise BadConfig(
            f"{where}: expected sections of settings, {EVERYBODY} or {', '.join(ROLES)}."
        )
    found = JsonObject()
    for section in (EVERYBODY, role):
        found |= parsed(NodeConfig, sections.get(section) or {}, f"{where}: {section}")
    return found


def make_parser() -> argparse.ArgumentParser:
    """The command line of ``python -m launch.node``."""
    return settings.make_parser(
        NodeConfig,
        "python -m launch.node",
        "One host of a cluster: an engine with its agent, or an agent alone.",
    )
