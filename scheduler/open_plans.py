"""What engines and agents were promised for plans that have not finished."""

from __future__ import annotations

import math
from collections.abc import Set

import msgspec
import numpy as np

from common.block import BlockKey
from common.ids import PlanId
from scheduler.cluster_state import ClusterState
from scheduler.hit import Work
from scheduler.parts import Blocks, Flags, longest_hit
from scheduler.plan import Item, Plan, PlanRequest
from scheduler.rows.processes import Device, Engines


class UnknownPlan(KeyError):
    """The plan has finished or never was."""


class _Open(msgspec.Struct):
    """A plan that has not finished, and how much of its hit still stands."""

    plan: Plan
    page_tokens: int
    hit_blocks: int
    engine_rows: tuple[int, int]
    agent_rows: list[int]
    missing: set[Item] = msgspec.field(default_factory=set)
    """What its readers turned out not to have in DRAM."""


def _reading(plan: PlanId) -> int:
    """Number of the promise to read for a plan ..."""
    return plan


def _moving(plan: PlanId) -> int:
    """... and of the promise to send and to receive, which outlasts the reading."""
    return ~plan


class OpenPlans:
    """Makes a plan's promises to the cluster's processes, and takes them back piece by piece."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state
        self._open: dict[PlanId, _Open] = {}

    def __len__(self) -> int:
        return len(self._open)

    def naming(self, names: Set[str]) -> int:
        """How many of them have one of these engines or agents."""
        return sum(
            not names.isdisjoint((p.prefill, p.decode, p.prefill_agent, p.decode_agent, *p.agents))
            for p in (entry.plan for entry in self._open.values())
        )

    def promise(
        self, plan: Plan, request: PlanRequest, rows: tuple[int, int], work: Work, now: float
    ) -> None:
        """Count the plan's work in. ``rows``: of its prefill and its decode engine."""
        engines, agents, number = self._state.engines, self._state.agents, plan.id
        miss = request.prompt_tokens - len(plan.keys) * request.page_tokens
        needed = request.prompt_tokens + request.max_new_tokens
        asked = np.array([[miss, 1, request.prompt_tokens], [0, 1, needed]], np.float64)
        engines.promise(np.array(rows), number, asked, math.inf)
        reading, moving = work.added.copy(), work.added.copy()
        reading[:, Device.COMPUTE_OUT :] = 0
        moving[:, : Device.COMPUTE_OUT] = 0
        agents.promise(work.rows, _reading(number), reading, now)
        agents.promise(work.rows, _moving(number), moving, math.inf)
        agents.assigned_bytes[work.rows] += reading.sum(axis=1)
        self._open[number] = _Open(
            plan, request.page_tokens, len(plan.keys), rows, work.rows.tolist()
        )

    def share_settled(
        self, plan: PlanId, agent: str, in_dram: list[bool]
    ) -> tuple[int, list[BlockKey]]:
        """How many leading blocks of the hit still stand, and what of the agent's share
        ``in_dram`` does not reach or denies; raises ``UnknownPlan``."""
        entry = self._entry(plan)
        complete = all(in_dram) and len(in_dram) >= entry.plan.share_items(agent)
        items = [] if complete else entry.plan.items(agent)
        missing = [i for n, i in enumerate(items) if n >= len(in_dram) or not in_dram[n]]
        if missing:
            entry.missing.update(missing)
            self._cut(entry, _whole_blocks(entry))
        row = self._state.agents.row_of.get(agent)
        if row is not None:  # else it has left the cluster
            self._state.agents.settle(row, _reading(plan))
        return entry.hit_blocks, [entry.plan.key_of(item) for item in missing]

    def submitted(self, plan: PlanId, now: float) -> None:
        """Reports soon show the work themselves; raises ``UnknownPlan``."""
        entry = self._entry(plan)
        for row in entry.engine_rows:
            self._state.engines.handed_over(row, plan, now)
        for row in entry.agent_rows:
            self._state.agents.handed_over(row, _moving(plan), now)

    def finished(self, plan: PlanId) -> None:
        """Take back what is left. Again, or of an unknown plan: no effect."""
        entry = self._open.pop(plan, None)
        if entry is None:
            return
        for row in entry.engine_rows:
            self._state.engines.settle(row, plan)
        for row in entry.agent_rows:
            self._state.agents.settle(row, _reading(plan))
            self._state.agents.settle(row, _moving(plan))

    def _entry(self, plan: PlanId) -> _Open:
        if plan not in self._open:
            raise UnknownPlan(plan)
        return self._open[plan]

    def _cut(self, entry: _Open, hit_blocks: int) -> None:
        """What is no hit any more has to be computed by the prefill engine."""
        lost_blocks = entry.hit_blocks - hit_blocks
        if lost_blocks <= 0:
            return
        entry.hit_blocks = hit_blocks
        engines, plan, row = self._state.engines, entry.plan.id, entry.engine_rows[0]
        promised = engines.promised_to(row, plan)
        if promised is not None:
            engines.settle(row, plan)
            promised[Engines.TOKENS] += lost_blocks * entry.page_tokens
            engines.promise(np.array([row]), plan, promised[None], math.inf)


def _whole_blocks(entry: _Open) -> int:
    """The longest hit that is whole without what is missing: of a part, other objects than those
    of the planned hit were not read."""
    plan, missing = entry.plan, entry.missing
    blocks = min((item.block for item in missing if not item.part), default=len(plan.keys))
    blocks = min(blocks, entry.hit_blocks)

    def held(number: int, of: Blocks) -> Flags:
        part = plan.parts[number]
        read = {block for block in part.blocks if Item(part.name, block) not in missing}
        return np.array([block in read for block in of.tolist()], bool)

    return longest_hit(blocks, [part.span_pages for part in plan.parts], held)
