"""The global path scheduler: one object, called by the gateway's loop.

Pure: reports and announcements are handed in, decisions come out, and the only clock is
the ``now`` (seconds, monotonic) of each call. One thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np

from common.block import TierName
from common.ids import FIRST_PLAN, Incarnation, PlanId
from common.prefill_cost import ForwardCost, coefficients
from scheduler import cluster_view
from scheduler.cluster_state import (
    DECODE,
    DEVICE_OF,
    PREFILL,
    ClusterState,
    Device,
    Engines,
)
from scheduler.decision import Decisions
from scheduler.directory.directory import Change, Directory
from scheduler.hit import Hit, Work
from scheduler.load_policy import LoadEstimate, worth_loading
from scheduler.options import SchedulerOptions
from scheduler.placement import choose_decode, choose_prefill, in_turn
from scheduler.plan import Plan, PlanRequest, Range
from scheduler.policies import read_policy


class _Open(msgspec.Struct):
    """A plan that has not finished, and how much of its hit still stands."""

    plan: Plan
    page_tokens: int
    hit_blocks: int
    engine_rows: tuple[int, int]
    agent_rows: list[int]


def _reading(plan: PlanId) -> int:
    """Number of the promise to read for a plan ..."""
    return plan


def _moving(plan: PlanId) -> int:
    """... and of the promise to send and to receive, which outlasts the reading."""
    return ~plan


def _missing(plan: Plan, agent: str, in_dram: list[bool]) -> list[int]:
    """Blocks of the agent's share that it does not have in DRAM, in prompt order."""
    mine = [
        block
        for part in plan.ranges
        if part.agent == agent
        for block in range(part.first, part.first + part.blocks)
    ]
    return [b for i, b in enumerate(mine) if i >= len(in_dram) or not in_dram[i]]


class UnknownPlan(KeyError):
    """The plan has finished or never was."""


class Scheduler:
    """Chooses engines and readers, and keeps account of what it promised.

    ``first_plan``: plan numbers count up from here. They are never reused (48 bits), so a
    restarted gateway begins above its predecessor, e.g. at its start time in ms x 128.
    """

    def __init__(
        self, policy: str, options: SchedulerOptions | None = None, first_plan: PlanId = FIRST_PLAN
    ) -> None:
        self.options = options or SchedulerOptions()
        self.set_policy(policy)
        self.directory = Directory(self.options.directory_entries_max)
        self.state = ClusterState(self.options)
        self._next_plan = first_plan
        self._chosen = 0
        self._open: dict[int, _Open] = {}
        self._decisions = Decisions(self.options.decisions_kept)

    def set_policy(self, name: str) -> None:
        """Use another read assignment from the next plan on; raises ``UnknownPolicy``."""
        self._policy = read_policy(name)
        self._rotates = getattr(self._policy, "rotates_engines", False)
        self._zero_io = getattr(self._policy, "zero_io", False)
        self.policy = name

    # ---- what is known ----------------------------------------------------------------

    def engine_report(
        self,
        name: str,
        *,
        role: str,
        agent: str,
        incarnation: Incarnation,
        sequences: int,
        pending_tokens: int,
        context_tokens: int,
        free_tokens: int,
        now: float,
        group: str = "",
        prefill_cost: ForwardCost | None = None,
    ) -> None:
        """A heartbeat of an engine, or of its group's leader. ``role`` is "prefill" or
        "decode", ``agent`` its node's."""
        engines = self.state.engines
        row = engines.report(name, incarnation, now)
        if row is None:
            return
        engines.is_prefill[row] = role == PREFILL
        engines.agent_row[row] = self.state.agents.row(agent)
        engines.group[row] = engines.groups.setdefault(group or name, len(engines.groups))
        engines.sequences[row], engines.pending_tokens[row] = sequences, pending_tokens
        engines.context_tokens[row], engines.free_tokens[row] = context_tokens, free_tokens
        if prefill_cost is not None:
            engines.prefill_cost[row] = coefficients(prefill_cost)
        self._notice(row, self.state.usable_engines)

    def agent_report(
        self,
        name: str,
        *,
        incarnation: Incarnation,
        read_queue_bytes: Mapping[TierName, int],
        read_bytes_per_s: Mapping[TierName, float],
        deliver_queue_bytes: int,
        deliver_bytes_per_s: float,
        dram_slots: int,
        dram_slots_free: int,
        now: float,
    ) -> None:
        """An agent's heartbeat. A new incarnation holds nothing until it announces it."""
        agents = self.state.agents
        row = agents.report(name, incarnation, now)
        if row is None:
            return
        self.directory.renewed(name, incarnation)
        for tier, device in DEVICE_OF.items():
            agents.queue_bytes[row, device] = read_queue_bytes.get(tier, 0)
            agents.measured(row, device, read_bytes_per_s.get(tier, 0.0), now)
        agents.queue_bytes[row, Device.COMPUTE_OUT] = deliver_queue_bytes
        agents.measured(row, Device.COMPUTE_OUT, deliver_bytes_per_s, now)
        agents.dram_slots[row], agents.dram_slots_free[row] = dram_slots, dram_slots_free
        self._notice(row, self.state.usable_agents)

    def _notice(self, row: int, usable: Any) -> None:
        """A process that was not usable may be now; of others the numbers are read live."""
        if row >= len(usable) or not usable[row]:
            self.state.changed()

    def engine_lost(self, name: str) -> None:
        """The engine's process is known to be gone: not used until it reports again."""
        if name in self.state.engines.row_of:
            self.state.engines.lost(name)
            self.state.changed()

    def agent_lost(self, name: str) -> None:
        """The agent's process is known to be gone, and with it what only it could read."""
        agents = self.state.agents
        if name in agents.row_of:
            agents.lost(name)
            self.state.changed()
            self.directory.forget(name, agents.incarnation[agents.row_of[name]])

    def drain(self, name: str, on: bool) -> None:
        """Give an engine or an agent nothing new, or again; also before it has reported."""
        for processes in (self.state.engines, self.state.agents):
            processes.drain(name, on)
        self.state.changed()

    def announce(
        self,
        agent: str,
        incarnation: Incarnation,
        sequence: int,
        snapshot: bool,
        changes: Iterable[Change],
    ) -> bool:
        """Holdings of an agent; False: subscribe to it again (see :meth:`Directory.apply`)."""
        return self.directory.apply(agent, incarnation, sequence, snapshot, changes)

    # ---- one request ------------------------------------------------------------------

    def plan(self, request: PlanRequest, now: float) -> Plan:
        """Decide engines and readers, and promise the work; raises ``NoEngine``.

        Call :meth:`finished` for every plan, whatever became of it.
        """
        state = self.state
        state.look(now)
        if self._rotates:
            prefill, decode = in_turn(state, PREFILL, request), in_turn(state, DECODE, request)
        else:
            prefill, decode = choose_prefill(state, request), choose_decode(state, request)
        self._chosen += 1
        state.engines.last_chosen[[prefill, decode]] = self._chosen
        hit = self._hit(request, prefill, decode)
        ranges, work, load = self._assign(hit, request, prefill)
        plan = self._build(request, prefill, decode, ranges, work.read_s)
        self._decisions.note(plan, state, self.policy, request.prompt_tokens, load, now)
        self._promise(plan, request, (prefill, decode), work, now)
        self.directory.expect_read(request.keys, plan.ranges)
        return plan

    def share_settled(self, plan: PlanId, agent: str, in_dram: list[bool], now: float) -> int:
        """A reader has settled its share (``Plan.shares()[agent]``, same order).

        What ``in_dram`` does not reach counts as not in DRAM, so ``[]`` gives the share up.
        Returns how many leading blocks of the plan's hit still stand; raises ``UnknownPlan``.
        """
        entry = self._entry(plan)
        blocks = sum(part.blocks for part in entry.plan.ranges if part.agent == agent)
        missing = (
            [] if all(in_dram) and len(in_dram) >= blocks else _missing(entry.plan, agent, in_dram)
        )
        if missing:
            self._cut(entry, missing[0])
            self.directory.expect(agent, [entry.plan.keys[b] for b in missing], in_dram=False)
        self.state.agents.settle(self.state.agents.row_of[agent], _reading(plan))
        return entry.hit_blocks

    def submitted(self, plan: PlanId, now: float) -> None:
        """The request was posted to both engines: reports soon show the work themselves."""
        entry = self._entry(plan)
        for row in entry.engine_rows:
            self.state.engines.handed_over(row, plan, now)
        for row in entry.agent_rows:
            self.state.agents.handed_over(row, _moving(plan), now)

    def finished(self, plan: PlanId, now: float) -> None:
        """The request is over, failed or cancelled. Again, or of an unknown plan: no effect."""
        entry = self._open.pop(plan, None)
        if entry is None:
            return
        for row in entry.engine_rows:
            self.state.engines.settle(row, plan)
        for row in entry.agent_rows:
            self.state.agents.settle(row, _reading(plan))
            self.state.agents.settle(row, _moving(plan))

    # ---- what can be seen -------------------------------------------------------------

    def explain(self, plan: PlanId | str, now: float) -> dict[str, Any] | None:
        """The candidates, backlogs, estimates and choice of a plan, by its number or its
        request's id; None if it is too long ago."""
        decision = self._decisions.find(plan)
        return decision.view(now) if decision is not None else None

    def expected_first_token_s(self, plan: PlanId) -> float:
        """See ``Decisions``."""
        return self._decisions.expected_first_token_s(plan)

    def cluster(self, now: float) -> dict[str, Any]:
        """Every number that decisions are made of, for metrics and the admin view."""
        self.state.look(now)
        return {
            "policy": self.policy,
            "load_policy": self.options.load_policy,
            "open_plans": len(self._open),
            "directory_blocks": len(self.directory),
            "directory_dropped_total": self.directory.dropped_total,
            "engines": cluster_view.engines(self.state, now),
            "agents": cluster_view.agents(self.state, now),
        }

    # ---- inside -----------------------------------------------------------------------

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
        engines, plan, row = self.state.engines, entry.plan.id, entry.engine_rows[0]
        promised = engines.promised_to(row, plan)
        if promised is not None:
            engines.settle(row, plan)
            promised[Engines.TOKENS] += lost_blocks * entry.page_tokens
            engines.promise(np.array([row]), plan, promised[None], math.inf)

    def _hit(self, request: PlanRequest, prefill: int, decode: int) -> Hit:
        agents, of_engine = self.state.agents.names, self.state.engines.agent_row
        alive = self.state.alive_agents
        return Hit(
            runs=self.directory.lookup(request.keys, alive) if request.use_cache else [],
            prefill_agent=agents[of_engine[prefill]],
            decode_agent=agents[of_engine[decode]],
            alive=alive,
            block_bytes=request.block_bytes,
        )

    def _assign(
        self, hit: Hit, request: PlanRequest, prefill: int
    ) -> tuple[list[Range], Work, LoadEstimate | None]:
        """Who reads what of as much of the hit as is worth loading."""
        state, load_policy = self.state, self.options.load_policy
        if not hit.runs or load_policy == "never":
            return [], Work.of(hit, [], state), None
        ranges = self._within_slots(self._policy.assign(hit, state))
        if self._zero_io:
            return ranges, Work.of(hit, [], state), None
        work = Work.of(hit, ranges, state)
        if not ranges or load_policy == "always":
            return ranges, work, None
        blocks = ranges[-1].first + ranges[-1].blocks
        start_s = work.ends_s - work.added / state.bytes_per_s[work.rows]
        first_s = float(start_s.min(where=work.added > 0, initial=math.inf))
        load = worth_loading(state, request, prefill, blocks, first_s, float(work.ends_s.max()))
        if load.load_blocks < blocks:
            shorter = hit.leading(load.load_blocks)
            ranges = self._within_slots(self._policy.assign(shorter, state))
            work = Work.of(hit, ranges, state)
        return ranges, work, load

    def _within_slots(self, ranges: list[Range]) -> list[Range]:
        """End the hit where a reader's share would exceed its DRAM: it is held as a whole."""
        agents = self.state.agents
        left: dict[str, float] = {}
        for index, part in enumerate(ranges):
            room = left.get(part.agent)
            if room is None:
                room = float(agents.dram_slots[agents.row_of[part.agent]])
            if part.blocks > room:
                last = msgspec.structs.replace(part, blocks=int(room))
                return [*ranges[:index], last] if room else ranges[:index]
            left[part.agent] = room - part.blocks
        return ranges

    def _build(
        self, request: PlanRequest, prefill: int, decode: int, ranges: list[Range], read_s: float
    ) -> Plan:
        engines, agents = self.state.engines, self.state.agents
        number = self._next_plan
        self._next_plan = PlanId(number + 1)
        blocks = ranges[-1].first + ranges[-1].blocks if ranges else 0
        return Plan(
            id=number,
            rid=request.rid,
            prefill=engines.names[prefill],
            decode=engines.names[decode],
            prefill_agent=agents.names[engines.agent_row[prefill]],
            decode_agent=agents.names[engines.agent_row[decode]],
            keys=request.keys[:blocks],
            ranges=ranges,
            block_bytes=request.block_bytes,
            estimated_read_s=read_s,
            zero_io=self._zero_io,
        )

    def _promise(
        self, plan: Plan, request: PlanRequest, rows: tuple[int, int], work: Work, now: float
    ) -> None:
        engines, agents, number = self.state.engines, self.state.agents, plan.id
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
