"""Pools of nodes that are alike: how many, on what hosts, with what settings.

They stand under ``pools`` in the file that ``launch.node --profile`` reads, beside the sections of
settings, so that one file says what a cluster is however its nodes are started.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from common.cluster.membership import Role
from common.json import JsonObject
from launch.node.config import POOLS, NodeConfig, profile_settings
from launch.settings import BadConfig, load_file, parsed

GATEWAY = "gateway"
Amount = Annotated[float, Meta(ge=0)]
Several = Annotated[int, Meta(ge=1)]
_ROLES = (*(role.value for role in Role), GATEWAY)


class Pool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """Engines of a role, readers, or a gateway and its standbys, that are alike."""

    role: Literal["prefill", "decode", "reader", "gateway"]
    count: Annotated[int, Meta(ge=0)] = 1
    """Engines, readers, or gateways."""
    nnodes: Several = 1
    """Hosts of each engine, all different ones."""
    cpus: Amount = 1.0
    """Of each host; what Ray has to know of, so that it does not give it away twice."""
    gpus: Annotated[int, Meta(ge=0)] = 0
    resources: dict[str, Amount] = msgspec.field(default_factory=dict)
    """Ray's own ones, of each host."""
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    """That a host must have been given (``ray start --labels``)."""
    settings: dict[str, object] = msgspec.field(default_factory=dict)
    """Of ``launch.node``, for this pool alone."""

    @property
    def bundle(self) -> dict[str, float]:
        """What of a host Ray sets aside."""
        found = {"CPU": self.cpus, "GPU": float(self.gpus), **self.resources}
        return {name: amount for name, amount in found.items() if amount}


@dataclass(frozen=True)
class Profile:
    """Of a cluster."""

    pools: Mapping[str, Pool]
    settings: Mapping[str, JsonObject]
    """Of ``launch.node``, by pool; parsed."""

    def names(self, pool: str, taken: frozenset[str] = frozenset()) -> list[str]:
        """Of what a pool should have: those there are, the lowest numbers first, and
        new ones at the lowest numbers that are free."""
        count, prefix = self.pools[pool].count, _prefix(pool)
        there = sorted((n for n in taken if pool_of(n, self.pools) == pool), key=number_of)
        names = there[:count]
        number = 0
        while len(names) < count:
            if (name := f"{prefix}{number}") not in there:
                names.append(name)
            number += 1
        return names

    def all_names(self, taken: frozenset[str]) -> list[str]:
        """Of all that there should be, gateways first."""
        pools = sorted(self.pools, key=lambda pool: pool != GATEWAY)
        return [name for pool in pools for name in self.names(pool, taken)]

    def with_count(self, pool: str, count: int) -> Profile:
        pools = dict(self.pools)
        pools[pool] = msgspec.structs.replace(pools[pool], count=count)
        return replace(self, pools=pools)

    def scaled(self, changes: Mapping[str, str]) -> Profile:
        """By role, or by the name of a pool: a number, or one more or less as ``+1`` and ``-1``.
        Raises :class:`BadConfig`."""
        profile = self
        for asked, amount in changes.items():
            pool = profile._pool(asked)
            if not re.fullmatch(r"[+-]?\d{1,6}", amount):
                raise BadConfig(f"{asked} {amount}: give a number, such as 3, +1 or -1.")
            now = profile.pools[pool].count
            count = now + int(amount) if amount[0] in "+-" else int(amount)
            if count < 0:
                raise BadConfig(f"{asked} {amount}: there are {now}.")
            profile = profile.with_count(pool, count)
        return profile

    def _pool(self, asked: str) -> str:
        if asked in self.pools:
            return asked
        of_role = [name for name, pool in self.pools.items() if pool.role == asked]
        if len(of_role) != 1:
            known = ", ".join(self.pools)
            raise BadConfig(
                f"{asked}: {len(of_role)} pools are of that role, of {known}: name one."
            )
        return of_role[0]


def pool_of(node: str, pools: Mapping[str, Pool]) -> str:
    """Of a node by its name; empty: of none of these."""
    named = [pool for pool in pools if re.fullmatch(re.escape(_prefix(pool)) + r"\d+", node)]
    return named[0] if named else ""


def is_gateway(name: str) -> bool:
    """Of what is placed, by its name."""
    return re.fullmatch(re.escape(_prefix(GATEWAY)) + r"\d+", name) is not None


def number_of(node: str) -> int:
    """Among those of its pool."""
    return int(re.split(r"\D", node)[-1])


def _prefix(pool: str) -> str:
    """As the nodes of one command are named, p0 and d0, where a pool has its role's name."""
    return pool[0] if pool in _ROLES else f"{pool}-"


def plain_profile(prefill: int, decode: int) -> Profile:
    """Without a file: engines of one host."""
    pools = {
        "prefill": Pool(role="prefill", count=prefill),
        "decode": Pool(role="decode", count=decode),
    }
    return _with_gateway(pools, dict.fromkeys(pools, JsonObject()))


def load_pools(path: Path) -> Profile:
    """From a file; raises :class:`BadConfig`."""
    return read_pools(load_file(path, "--hosts"), f"--hosts {path}")


def read_pools(sections: object, where: str) -> Profile:
    """From what a file says; raises :class:`BadConfig`."""
    raw = sections.get(POOLS) if isinstance(sections, dict) else None
    if not isinstance(raw, dict) or not raw:
        raise BadConfig(f"{where}: expected a section `{POOLS}` with a line for each pool.")
    pools, settings = {}, {}
    for key, value in raw.items():
        name, here = str(key), f"{where}: {POOLS}: {key}"
        pools[name] = pool = _pool(name, value, here)
        own = parsed(NodeConfig, pool.settings, f"{here}: settings")
        settings[name] = profile_settings(sections, pool.role, where) | own
    return _with_gateway(pools, settings)


def _pool(name: str, raw: object, where: str) -> Pool:
    if not re.fullmatch("[a-z]([a-z0-9_-]{0,18}[a-z])?", name):  # no digit last: a node's is
        raise BadConfig(f"{where}: name a pool by small letters, digits, - and _, a letter last.")
    given = {"role": name, **raw} if isinstance(raw, dict) else {"role": name}
    if given["role"] not in _ROLES:
        raise BadConfig(f"{where}: role {given['role']!r}: choose one of {', '.join(_ROLES)}.")
    try:
        pool = msgspec.convert(given, Pool)
    except msgspec.ValidationError as error:
        raise BadConfig(f"{where}: {error}.") from error
    is_engine = pool.role in (Role.PREFILL.value, Role.DECODE.value)
    if pool.nnodes > 1 and not is_engine:
        raise BadConfig(f"{where}: nnodes {pool.nnodes}: only engines are spread over hosts.")
    if name in _ROLES and name != pool.role:
        raise BadConfig(f"{where}: a pool of this name has role {name}: name it otherwise.")
    return pool


def _with_gateway(pools: dict[str, Pool], settings: dict[str, JsonObject]) -> Profile:
    gateways = [name for name, pool in pools.items() if pool.role == GATEWAY]
    if gateways not in ([], [GATEWAY]) or GATEWAY in pools and not pools[GATEWAY].count:
        raise BadConfig(f"gateways are of one pool, `{GATEWAY}`, one at least.")
    if not gateways:
        pools = {GATEWAY: Pool(role="gateway"), **pools}
    return Profile(pools, {GATEWAY: JsonObject(), **settings})
