"""The global path scheduler: one object, called by the gateway's loop.

Pure: reports and announcements are handed in, decisions come out, and the only clock is
the ``now`` (seconds, monotonic) of each call. One thread.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Set

from common.block import BlockKey
from common.ids import FIRST_PLAN, Incarnation, PlanId
from common.loads import AgentLoad, EngineLoad
from common.messages.from_agents import Holding
from scheduler import cluster_view
from scheduler.assignment import Assignment, assign
from scheduler.cluster_state import DECODE, PREFILL, ClusterState
from scheduler.cluster_view import ClusterView
from scheduler.decision import Decisions, PlanView
from scheduler.directory.directory import Directory
from scheduler.hit import Hit
from scheduler.open_plans import OpenPlans
from scheduler.options import SchedulerOptions
from scheduler.parts import Hits
from scheduler.placement import choose_decode, choose_prefill, in_turn
from scheduler.plan import Item, Plan, PlanRequest
from scheduler.policies import experiment_of, read_policy, rotates_engines

log = logging.getLogger(__name__)


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
        self.next_plan = first_plan
        """Its number; may be raised."""
        self.open = OpenPlans(self.state)
        self._decisions = Decisions(self.options.decisions_kept)

    def set_policy(self, name: str) -> None:
        """Use another read assignment from the next plan on; raises ``UnknownPolicy``."""
        self._policy = read_policy(name)
        experiment_of(self._policy).announce(log)
        self.policy = name

    # ---- what is known ----------------------------------------------------------------

    def report(self, load: EngineLoad | AgentLoad, now: float) -> None:
        """A heartbeat of an engine (or of its group's leader), or of an agent: its new
        incarnation holds nothing until it announces it."""
        if isinstance(load, EngineLoad):
            self.state.report_engine(load, now)
        elif self.state.report_agent(load, now):
            self.directory.renewed(load.agent, load.incarnation)

    def engine_lost(self, name: str) -> None:
        """The engine's process is known to be gone: not used until it reports again."""
        if name in self.state.engines.row_of:
            self.state.engines.lost(name)
            self.state.changed()

    def removed(self, name: str) -> None:
        """An engine, or an agent whose engine has been removed before, has left the cluster:
        nothing is kept of it. What its open plans still say of it is of no effect."""
        for processes in (self.state.engines, self.state.agents):
            processes.remove(name)
        self.directory.remove(name)
        self.state.changed()

    @property
    def drained(self) -> Set[str]:
        """Engines, and agents, that get nothing new."""
        return self.state.engines.drained

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
        changes: Iterable[Holding],
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
        if rotates_engines(self._policy):
            prefill, decode = in_turn(state, PREFILL, request), in_turn(state, DECODE, request)
        else:
            prefill, decode = choose_prefill(state, request), choose_decode(state, request)
        state.engines.note_chosen(prefill, decode)
        keys = request.keys if request.use_cache else []
        runs = self.directory.lookup(keys, state.reachable(prefill, decode))
        whole = Hit.of(runs, prefill, decode, request.block_bytes, state)
        hits = Hits(self.directory, request, whole)
        assigned = assign(self._policy, hits, request, prefill, state)
        plan = self._build(request, (prefill, decode), hits, assigned)
        self._decisions.note(plan, state, self.policy, request.prompt_tokens, assigned.load, now)
        self.open.promise(plan, request, (prefill, decode), assigned.work, now)
        self.directory.expect_read(request.keys, plan.ranges)
        objects: defaultdict[str, list[BlockKey]] = defaultdict(list)
        for reads in plan.parts:
            for each in reads.ranges:
                blocks = range(each.first, each.first + each.blocks)
                objects[each.agent] += [plan.key_of(Item(reads.name, block)) for block in blocks]
        for agent, keys in objects.items():
            self.directory.expect(agent, keys, in_dram=True)
        return plan

    def share_settled(self, plan: PlanId, agent: str, in_dram: list[bool], now: float) -> int:
        """A reader has settled its share (``Plan.shares()[agent]``, same order).

        What ``in_dram`` does not reach counts as not in DRAM, so ``[]`` gives the share up.
        Returns how many leading blocks of the plan's hit still stand; raises ``UnknownPlan``.
        """
        hit_blocks, missing = self.open.share_settled(plan, agent, in_dram)
        self.directory.expect(agent, missing, in_dram=False)
        return hit_blocks

    def submitted(self, plan: PlanId, now: float) -> None:
        """The request was posted to both engines: reports soon show the work themselves."""
        self.open.submitted(plan, now)

    def finished(self, plan: PlanId, now: float) -> None:
        """The request is over, failed or cancelled. Again, or of an unknown plan: no effect."""
        self.open.finished(plan)

    # ---- what can be seen -------------------------------------------------------------

    def explain(self, plan: PlanId | str, now: float) -> PlanView | None:
        """The candidates, backlogs, estimates and choice of a plan, by its number or its
        request's id; None if it is too long ago."""
        decision = self._decisions.find(plan)
        return decision.view(now) if decision is not None else None

    def expected_first_token_s(self, plan: PlanId) -> float:
        """See ``Decisions``."""
        return self._decisions.expected_first_token_s(plan)

    def cluster(self, now: float) -> ClusterView:
        """Every number that decisions are made of, for metrics and the admin view."""
        self.state.look(now)
        return {
            "policy": self.policy,
            "load_policy": self.options.load_policy,
            "open_plans": len(self.open),
            "directory_blocks": len(self.directory),
            "directory_dropped_total": self.directory.dropped_total,
            "engines": cluster_view.engines(self.state, now),
            "agents": cluster_view.agents(self.state, now),
        }

    # ---- inside -----------------------------------------------------------------------

    def _build(
        self, request: PlanRequest, rows: tuple[int, int], hits: Hits, assigned: Assignment
    ) -> Plan:
        (prefill, decode), engines, agents = rows, self.state.engines, self.state.agents
        ranges, parts = hits.split(assigned.hit, assigned.ranges)
        number = self.next_plan
        self.next_plan = PlanId(number + 1)
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
            engine_rid=request.engine_rid,
            estimated_read_s=assigned.work.read_s,
            experiment=experiment_of(self._policy),
            parts=parts,
            held_blocks=hits.whole.blocks,
            lacking=hits.lacking,
        )
