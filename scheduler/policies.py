"""Read assignment: which agent brings each hit block of a request into its memory.

A policy is a small class, chosen by name. It sees the hit and the cluster; it returns
who reads which consecutive blocks, and ends where a block has no possible reader.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec
import numpy as np

from scheduler.cluster_state import DEVICE_OF, READING, ClusterState, Device, Floats, Rows
from scheduler.directory import Run
from scheduler.holder_sets import Holders
from scheduler.plan import Range
from storage.tier import TierName

DELIVERIES = 2
"""Of each block: into the prefill engine and into the decode engine."""


class Hit(msgspec.Struct, frozen=True):
    """The hit prefix of one request: who has each block, and whom it is for."""

    runs: list[Run]
    prefill_agent: str
    decode_agent: str
    alive: frozenset[str]
    """Agents that may read."""
    block_bytes: int

    @property
    def blocks(self) -> int:
        return self.runs[-1].first + self.runs[-1].blocks if self.runs else 0

    @property
    def sides(self) -> list[str]:
        """Agents of the prefill and of the decode engine, in this order, as far as they are
        alive, each once: two, one (same node, or the other is dead) or none."""
        both = dict.fromkeys((self.prefill_agent, self.decode_agent))
        return [agent for agent in both if agent in self.alive]

    def leading(self, blocks: int) -> Hit:
        """The same for the first ``blocks`` blocks."""
        runs = [
            run if run.first + run.blocks <= blocks else Run(run.first, blocks - run.first, holders)
            for run in self.runs
            if (holders := run.holders) and run.first < blocks
        ]
        return msgspec.structs.replace(self, runs=runs)


class ReadPolicy(Protocol):
    """Assigns readers."""

    def assign(self, hit: Hit, state: ClusterState) -> list[Range]:
        """Who reads what: covers a prefix of the hit, in order, each block once, and gives
        a block only to an agent for which :meth:`Holders.tier_at` has a tier."""


class UnknownPolicy(ValueError):
    """No read assignment of that name."""

    def __init__(self, name: str, reason: str = "") -> None:
        choices = f"choose one of {', '.join(POLICY_NAMES)}, or module:Class"
        super().__init__(f"unknown path policy {name!r}{reason and f' ({reason})'}; {choices}")
        self.name = name


# ---- the simple ones: one reader a run ----------------------------------------------------


class OneSide:
    """One fixed side reads whatever it can; a block that it cannot read comes from a holder.

    ``prefill``: the paper's PE path, which is how P/D disaggregation reads today (Basic).
    ``decode``: everything through the DE's side.
    """

    def __init__(self, side: str) -> None:
        self._side = side

    def assign(self, hit: Hit, state: ClusterState) -> list[Range]:
        side = hit.prefill_agent if self._side == "prefill" else hit.decode_agent
        return from_side(hit, state, side if side in hit.alive else None, dram_first=False)


class Oracle(OneSide):
    """As if P's side had every hit block delivered for nothing: the zero-I/O bound of the
    paper's evaluation. Tokens are wrong by design; for benchmarks only."""

    zero_io = True

    def __init__(self) -> None:
        super().__init__("prefill")


class RoundRobin:
    """Both paths without a scheduler, the paper's ablation (section 7.4): requests take the
    PE and the DE path in turns, and engines are taken in turns as well."""

    rotates_engines = True

    def __init__(self) -> None:
        self._turn = 0

    def assign(self, hit: Hit, state: ClusterState) -> list[Range]:
        self._turn += 1
        sides = hit.sides
        return from_side(hit, state, sides[self._turn % len(sides)] if sides else None)


class ShorterQueue:
    """The paper's rule (section 6.1): the side with the shorter read queue reads all.

    What some agent has in DRAM already is delivered from there, without a read.
    """

    def assign(self, hit: Hit, state: ClusterState) -> list[Range]:
        return from_side(hit, state, min(hit.sides, key=state.read_backlog_s, default=None))


def from_side(
    hit: Hit, state: ClusterState, side: str | None, dram_first: bool = True
) -> list[Range]:
    """Every block from ``side`` where it can have it, else from the least busy holder."""

    def reader(holders: Holders) -> str | None:
        if dram_first and holders.dram:
            return in_dram(hit, holders, state)
        if side is not None and holders.tier_at(side) is not None:
            return side
        return holder(holders, state)

    return until_none((run, reader(run.holders)) for run in hit.runs)


def until_none(readers: Iterable[tuple[Run, str | None]]) -> list[Range]:
    """Ranges of the runs, up to the first that has no reader."""
    ranges = []
    for run, agent in readers:
        if agent is None:
            break
        ranges.append(Range(run.first, run.blocks, agent, expected_tier(run.holders, agent)))
    return ranges


def in_dram(hit: Hit, holders: Holders, state: ClusterState) -> str:
    """An agent that has the block in memory: P's, else D's, else the least busy."""
    for side in hit.sides:
        if side in holders.dram:
            return side
    return min(holders.dram, key=state.read_backlog_s)


def holder(holders: Holders, state: ClusterState) -> str | None:
    """The least busy agent that has the block in memory, or else on its SSD."""
    return min(holders.dram or holders.ssd, key=state.read_backlog_s, default=None)


def expected_tier(holders: Holders, reader: str) -> TierName:
    """Where ``reader`` will find a block that a policy gave to it."""
    tier = holders.tier_at(reader)
    if tier is None:
        raise ValueError(f"{reader} was assigned a block that it cannot read")
    return tier


# ---- estimates ----------------------------------------------------------------------------


class Work(msgspec.Struct, frozen=True):
    """What a set of ranges asks of the agents: ``added[i]`` bytes by :class:`Device` of the
    agent in row ``rows[i]``, readers first; and when each device has done it, at the
    backlogs of then (0 where it has none)."""

    rows: Rows
    added: Floats
    ends_s: Floats

    @staticmethod
    def of(hit: Hit, ranges: list[Range], state: ClusterState) -> Work:
        """Reading and sending at the readers, receiving at the nodes of P and D."""
        by_row: dict[int, list[float]] = {}
        row_of = state.agents.row_of
        total_bytes = 0.0
        for part in ranges:
            mine = by_row.setdefault(row_of[part.agent], [0.0] * len(Device))
            part_bytes = part.blocks * hit.block_bytes
            total_bytes += part_bytes
            mine[Device.COMPUTE_OUT] += DELIVERIES * part_bytes
            if part.tier is not TierName.DRAM:
                mine[DEVICE_OF[part.tier]] += part_bytes
        for agent in hit.sides if ranges else ():
            mine = by_row.setdefault(row_of[agent], [0.0] * len(Device))
            mine[Device.COMPUTE_IN] += total_bytes
        rows = np.array(list(by_row), np.intp)
        added = np.array(list(by_row.values())).reshape(-1, len(Device))
        queued = state.agents.queue_bytes[rows] + state.agents.promised[rows]
        ends_s = (queued + added) / state.bytes_per_s[rows]
        ends_s[added == 0] = 0
        return Work(rows, added, ends_s)

    @property
    def read_s(self) -> float:
        """When the last byte has been read from storage."""
        return float(self.ends_s[:, READING].max(initial=0.0))


def last_byte_s(hit: Hit, ranges: list[Range], state: ClusterState) -> float:
    """When the last of these ranges has been read, sent and received."""
    return float(Work.of(hit, ranges, state).ends_s.max(initial=0.0))


# ---- by name ------------------------------------------------------------------------------


def _split() -> ReadPolicy:
    from scheduler.water_filling import WaterFilling

    return WaterFilling(anyone=False)


def _n_way() -> ReadPolicy:
    from scheduler.water_filling import WaterFilling

    return WaterFilling(anyone=True)


POLICIES: dict[str, Callable[[], ReadPolicy]] = {
    "prefill": lambda: OneSide("prefill"),
    "decode": lambda: OneSide("decode"),
    "round-robin": RoundRobin,
    "shorter-queue": ShorterQueue,
    "split": _split,
    "n-way": _n_way,
    "oracle": Oracle,
}
POLICY_NAMES = tuple(POLICIES)


def read_policy(name: str) -> ReadPolicy:
    """The policy of that name, or of a user's own class ``module:Class``, built without
    arguments; raises :class:`UnknownPolicy` with the choices."""
    if name in POLICIES:
        return POLICIES[name]()
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UnknownPolicy(name)
    try:
        policy: ReadPolicy = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError) as error:
        raise UnknownPolicy(name, str(error)) from error
    return policy
