"""The hit prefix of one request, and what reading it asks of the cluster's devices."""

from __future__ import annotations

import msgspec
import numpy as np

from common.block import TierName
from scheduler.cluster_state import ClusterState
from scheduler.directory.directory import Run
from scheduler.directory.holder_sets import Holders
from scheduler.plan import Range
from scheduler.rows.processes import DEVICE_OF, READING, Device, Floats, Rows

DELIVERIES = 2
"""Of each block: into the prefill engine and into the decode engine. Objects of parts go into the
prefill engine alone, which sends what comes of them."""


class Extra(msgspec.Struct, frozen=True):
    """Objects of a part, behind the blocks of a hit: from item ``first`` on."""

    first: int
    item_bytes: int


class Hit(msgspec.Struct, frozen=True):
    """The hit prefix of one request: who has each block, and whom it is for. Behind its blocks
    come, as so many more, the objects of parts that it needs (:mod:`scheduler.parts`)."""

    runs: list[Run]
    prefill_agent: str
    decode_agent: str
    alive: frozenset[str]
    """Agents that may read: both engines are linked to them."""
    block_bytes: int
    extras: list[Extra] = []
    items: int = 0
    """Blocks and objects of parts; 0 where there are no parts."""

    @staticmethod
    def of(
        runs: list[Run], prefill: int, decode: int, block_bytes: int, state: ClusterState
    ) -> Hit:
        """For the engines in these rows."""
        agents, of_engine = state.agents.names, state.engines.agent_row
        return Hit(
            runs=runs,
            prefill_agent=agents[of_engine[prefill]],
            decode_agent=agents[of_engine[decode]],
            alive=state.reachable(prefill, decode),
            block_bytes=block_bytes,
        )

    @property
    def blocks(self) -> int:
        """Without objects of parts."""
        if self.extras:
            return self.extras[0].first
        return self.runs[-1].first + self.runs[-1].blocks if self.runs else 0

    @property
    def sides(self) -> list[str]:
        """Agents of the prefill and of the decode engine, in this order, as far as they are
        alive, each once: two, one (same node, or the other is dead) or none."""
        both = dict.fromkeys((self.prefill_agent, self.decode_agent))
        return [agent for agent in both if agent in self.alive]

    def bytes_of(self, part: Range) -> tuple[int, int]:
        """Of a range: bytes of blocks, and of objects of parts."""
        if not self.extras:
            return part.blocks * self.block_bytes, 0
        block_count = min(part.blocks, max(0, self.blocks - part.first))
        part_bytes = 0
        ends = [*(extra.first for extra in self.extras[1:]), self.items]
        for extra, end in zip(self.extras, ends, strict=True):
            count = min(part.first + part.blocks, end) - max(part.first, extra.first)
            part_bytes += max(0, count) * extra.item_bytes
        return block_count * self.block_bytes, part_bytes

    def item_bytes(self, item: int) -> int:
        """Size of the block, or of the object of a part, at a place in the hit."""
        mine = [extra.item_bytes for extra in self.extras if extra.first <= item]
        return mine[-1] if mine else self.block_bytes

    def leading(self, blocks: int) -> Hit:
        """The same for the first ``blocks`` blocks."""
        runs = [
            run if run.first + run.blocks <= blocks else Run(run.first, blocks - run.first, holders)
            for run in self.runs
            if (holders := run.holders) and run.first < blocks
        ]
        return msgspec.structs.replace(self, runs=runs)


def expected_tier(holders: Holders, reader: str) -> TierName:
    """Where ``reader`` will find a block that a policy gave to it."""
    tier = holders.tier_at(reader)
    if tier is None:
        raise ValueError(f"{reader} was assigned a block that it cannot read")
    return tier


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
        total_bytes = prefill_bytes = 0.0
        for part in ranges:
            mine = by_row.setdefault(row_of[part.agent], [0.0] * len(Device))
            block_bytes, part_bytes = hit.bytes_of(part)
            total_bytes += block_bytes
            prefill_bytes += part_bytes
            mine[Device.COMPUTE_OUT] += DELIVERIES * block_bytes + part_bytes
            if part.tier is not TierName.DRAM:
                mine[DEVICE_OF[part.tier]] += block_bytes + part_bytes
        for agent in hit.sides if ranges else ():
            mine = by_row.setdefault(row_of[agent], [0.0] * len(Device))
            is_prefill = agent == hit.prefill_agent
            mine[Device.COMPUTE_IN] += total_bytes + (prefill_bytes if is_prefill else 0.0)
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
