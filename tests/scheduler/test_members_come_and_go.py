"""Engines and agents that join and leave: what is kept of them shrinks with them, and no plan
names one that has left, or that an engine has no link to."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.block import TierName
from common.ids import Incarnation, PlanId
from common.messages.from_agents import Holding
from scheduler.scheduler import Scheduler
from tests.scheduler.clusters import cluster, hold, keys_of, report_agent, report_engine, request

NODES = [f"{role}{number}" for role in "pd" for number in range(4)]
BLOCKS = 12


class Changing:
    """A cluster whose nodes come, hold blocks, and go; plans stay open over that."""

    def __init__(self) -> None:
        self.scheduler = Scheduler("n-way")
        self.now = 0.0
        self.there: set[str] = set()
        self.most = 0
        self.incarnation = 0
        self.open: list[PlanId] = []

    def join(self, node: str) -> None:
        self.there.add(node)
        self.most = max(self.most, len(self.there))
        self.incarnation += 1
        number = Incarnation(self.incarnation)
        agent = f"agent-{node}"
        report_agent(self.scheduler, agent, self.now, incarnation=number)
        report_engine(self.scheduler, node, self.now, incarnation=number, group=node[0])
        first = self.incarnation % BLOCKS
        held = [Holding(key, TierName.SSD, True) for key in keys_of(BLOCKS)[: first + 1]]
        assert self.scheduler.announce(agent, number, 0, True, held)

    def leave(self, node: str) -> None:
        self.there.discard(node)
        self.scheduler.removed(node)
        self.scheduler.removed(f"agent-{node}")

    def plan(self) -> None:
        if {node[0] for node in self.there} < {"p", "d"}:
            return
        plan = self.scheduler.plan(request(blocks=BLOCKS), self.now)
        agents = {f"agent-{node}" for node in self.there}
        assert {plan.prefill, plan.decode} <= self.there
        assert {plan.prefill_agent, plan.decode_agent, *plan.agents} <= agents
        self.open.append(plan.id)

    def finish(self) -> None:
        if self.open:
            plan = self.open.pop(0)
            self.scheduler.submitted(plan, self.now)
            self.scheduler.finished(plan, self.now)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*NODES, *NODES, "plan", "plan", "finish"]), max_size=60))
def test_what_is_kept_shrinks_with_the_cluster(steps: list[str]) -> None:
    changing = Changing()
    scheduler, state = changing.scheduler, changing.scheduler.state
    for step in steps:
        changing.now += 0.1
        if step == "plan":
            changing.plan()
        elif step == "finish":
            changing.finish()
        elif step in changing.there:
            changing.leave(step)
        else:
            changing.join(step)
        view = scheduler.cluster(changing.now)
        assert {e["name"] for e in view["engines"]} == changing.there
        assert {a["name"] for a in view["agents"]} == {f"agent-{n}" for n in changing.there}
    for node in list(changing.there):
        changing.leave(node)
    while changing.open:
        changing.finish()
    assert len(state.engines.names) <= changing.most  # rows are reused
    assert len(state.agents.names) <= changing.most
    sets = scheduler.directory._table.sets
    kept = (state.engines, state.agents)
    assert all(not one.row_of and not one.drained and not one.promised.any() for one in kept)
    assert not state.engines.linked and not state.engines.groups.number_of
    assert not sets._agents.number_of and len(sets) == 1 and not scheduler.directory._streams
    assert len(scheduler.directory) == 0


def test_bits_of_an_agent_that_left_say_nothing_of_the_next_one() -> None:
    scheduler = cluster("n-way", 1, 1)
    hold(scheduler, "agent-p0", 4, TierName.SSD)
    directory = scheduler.directory
    assert directory.lookup(keys_of(4), frozenset(["agent-p0"]))
    scheduler.removed("p0")
    scheduler.removed("agent-p0")
    report_agent(scheduler, "agent-p1")
    hold(scheduler, "agent-p1", 2, TierName.SSD)
    others = frozenset(["agent-p1"])
    assert sum(run.blocks for run in directory.lookup(keys_of(4), others)) == 2
    assert directory.lookup(keys_of(4), frozenset(["agent-p0"])) == []


def test_a_decision_of_before_keeps_the_names_of_then() -> None:
    scheduler = cluster("split", 1, 2)
    plan = scheduler.plan(request(), 0.0)
    before = scheduler.explain(plan.id, 0.0)
    scheduler.removed(plan.decode)
    report_engine(scheduler, "p7")
    assert before == scheduler.explain(plan.id, 0.0)


@pytest.mark.parametrize(
    ("of_p", "of_d", "readers"),
    [
        (None, None, "pdr"),
        ("pdr", "pdr", "pdr"),
        (None, "pd", "pd"),
        ("pr", "pd", "p"),
        ("", None, ""),
        ("rx", "rx", "r"),
    ],
)
def test_only_agents_that_both_engines_are_linked_to_read(
    of_p: str | None, of_d: str | None, readers: str
) -> None:
    scheduler = cluster("n-way", 1, 1)
    report_agent(scheduler, "agent-r0")
    for agent in names("pdr"):
        hold(scheduler, agent, 100, TierName.REMOTE)
    report_engine(scheduler, "p0", linked=None if of_p is None else names(of_p))
    report_engine(scheduler, "d0", linked=None if of_d is None else names(of_d))
    assert set(scheduler.plan(request(blocks=100), 0.0).agents) == set(names(readers))


def names(nodes: str) -> list[str]:
    return [f"agent-{node}0" for node in nodes]
