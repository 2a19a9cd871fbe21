"""What runs on each host: the command lines of the gateway and of the nodes, made here and checked
here, so that what cannot work is said before anything is placed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import msgspec

from common.cluster.membership import Role
from launch.cluster.config import ClusterConfig
from launch.cluster.layout import ENGINE_ROLES
from launch.cluster.ports import block_ports, meeting
from launch.cluster.tensor_parallel import EngineRanks, ranks_of
from launch.flags.gateway import GatewaySettings
from launch.flags.node import DEFAULT_BASE_PORT, NodeSettings
from launch.node.config import NodeConfig
from launch.ray.profile import GATEWAY, Pool, Profile, is_gateway, pool_of
from launch.settings import flag, flags_of, secrets_of, settings_of

SECRET_FILE = "{secret-file}"
"""In a command line: where its host puts the cluster's secret."""
PORTS_STEP = 48
_LOOPBACK = "127.0.0.1"
_GATEWAY_URL = "http://gateway"
"""While none is placed."""


class HostCommand(msgspec.Struct, frozen=True):
    """Of one host of an engine, a reader or a gateway."""

    name: str
    """Of the engine, the reader or the gateway, as it is placed."""
    rank: int
    """Of the host, among those of an engine."""
    module: str
    flags: list[str]
    urls: list[str]
    """Of the gateway and its standbys."""
    first_port: int = 0
    ports: int = 0
    """From there on, that are its own."""
    drain_s: float = 0.0
    """So long it may take to end."""


class Commands:
    """Of one cluster. Methods raise :class:`~launch.settings.BadConfig`."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config

    def url(self, address: str) -> str:
        """Of a gateway there."""
        scheme = "https" if self._config.ssl_certfile else "http"
        return f"{scheme}://{address}:{self._config.port}"

    def gateway(self, name: str, address: str, urls: Sequence[str]) -> HostCommand:
        """``urls``: of all gateways."""
        config = self._config
        # The default is right where one command starts everything on one host.
        host = address if config.host == _LOOPBACK else config.host
        flags = flags_of(
            replace(config, host=host, cluster_secret_file=SECRET_FILE), GatewaySettings
        )
        if len(urls) > 1:
            flags.append(f"{flag('standby_of')}={','.join(urls)}")
        return HostCommand(name, 0, "launch.gateway", flags, list(urls))

    def node(
        self,
        profile: Profile,
        name: str,
        urls: Sequence[str],
        addresses: Sequence[str],
        taken: Iterable[range] = (),
    ) -> list[HostCommand]:
        """One for each host of an engine, or a reader's; ``taken`` are ports of other nodes
        there."""
        config, pool = self._settings(profile, name, urls), _pool(profile, name)
        ranks = [_ranks(config, role, pool) for role in ENGINE_ROLES]
        ports = max(map(block_ports, ranks))  # of a process
        first = _first_free(config.base_port or DEFAULT_BASE_PORT, 2 * ports, list(taken))
        engine = first + ports
        commands = []
        for rank, address in enumerate(addresses):
            own = replace(config, host=address, base_port=first)
            if pool.nnodes > 1:
                meet = engine + meeting(_ranks(config, Role(pool.role), pool))
                at = f"{addresses[0]}:{meet}"
                own = replace(own, nnodes=pool.nnodes, node_rank=rank, dist_init_addr=at)
            flags, drain_s = flags_of(own, NodeConfig), config.drain_timeout_s
            commands.append(
                HostCommand(name, rank, "launch.node", flags, list(urls), first, 2 * ports, drain_s)
            )
        return commands

    def check(self, profile: Profile) -> None:
        """A node of each pool, as if it were placed."""
        for pool, found in profile.pools.items():
            if pool != GATEWAY:
                name = profile.with_count(pool, 1).names(pool)[0]
                self.node(profile, name, [_GATEWAY_URL], [_LOOPBACK] * found.nnodes)

    def secrets(self, profile: Profile, name: str) -> dict[str, str]:
        """The environment in which a command has what no command line may have."""
        if is_gateway(name):
            return secrets_of(self._config, GatewaySettings)
        return secrets_of(self._settings(profile, name, [_GATEWAY_URL]), NodeConfig)

    def _settings(self, profile: Profile, name: str, urls: Sequence[str]) -> NodeConfig:
        """Flags of the command win over the profile, as everywhere."""
        given = {
            key: value
            for key, declared in settings_of(NodeSettings).items()
            if (value := getattr(self._config, key)) != declared.default
        }
        fixed = {
            "join": tuple(urls),
            "role": _pool(profile, name).role,
            "name": name,
            "cluster_secret_file": SECRET_FILE,
        }
        return NodeConfig(**{**profile.settings[pool_of(name, profile.pools)], **given, **fixed})


def _pool(profile: Profile, name: str) -> Pool:
    return profile.pools[pool_of(name, profile.pools)]


def _ranks(config: NodeConfig, role: Role, pool: Pool) -> EngineRanks:
    flags = [
        *config.engine_args,
        *(config.prefill_args if role is Role.PREFILL else config.decode_args),
    ]
    is_spread = role.value == pool.role
    return ranks_of([*flags, "--nnodes", str(pool.nnodes)] if is_spread else flags)


def _first_free(first: int, count: int, taken: Sequence[range]) -> int:
    """The lowest, from ``first`` on, of so many ports that nobody else has."""
    for port in itertools.count(first, PORTS_STEP):
        own = range(port, port + count)
        if not any(own.start < other.stop and other.start < own.stop for other in taken):
            return port
    raise AssertionError("unreachable: there is always a next port")
