"""Whatever happens in whatever order: accounts close, and plans are well formed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.block import TierName
from scheduler.policies import POLICY_NAMES
from scheduler.scheduler import Scheduler
from tests.examples import examples
from tests.scheduler.clusters import cluster, hold, keys_of, report_agent, report_engine, request

actions = st.lists(
    st.tuples(
        st.sampled_from(["plan", "plan", "settle", "submit", "report", "lose", "finish"]),
        st.integers(0, 5),
        st.integers(0, 12),
    ),
    max_size=40,
)


def play(policy: str, script: list[tuple[str, int, int]]) -> tuple[Scheduler, list]:
    """Run a script of events; returns the scheduler with every plan finished, and the plans."""
    scheduler = cluster(policy)
    hold(scheduler, "agent-p0", 6, TierName.SSD)
    hold(scheduler, "agent-d1", 4, TierName.DRAM)
    hold(scheduler, "agent-d0", 9, TierName.REMOTE)
    names = ["p0", "p1", "d0", "d1"]
    plans, open_plans, now = [], [], 0.0
    for action, which, size in script:
        now += 0.1
        if action == "plan":
            plans.append(scheduler.plan(request(blocks=size), now))
            open_plans.append(plans[-1])
        elif action == "report":
            report_engine(scheduler, names[which % 4], now)
            report_agent(scheduler, f"agent-{names[which % 4]}", now)
        elif action == "lose":
            scheduler.removed("p1")
            scheduler.removed("agent-p1")
        elif open_plans:
            plan = open_plans[which % len(open_plans)]
            if action == "settle":
                for agent, share in plan.shares().items():
                    hit = scheduler.share_settled(plan.id, agent, [True] * len(share), now)
                    assert hit == len(plan.keys)
            elif action == "submit":
                scheduler.submitted(plan.id, now)
            else:
                scheduler.finished(plan.id, now)
                open_plans.remove(plan)
    for plan in plans:
        scheduler.finished(plan.id, now)
    return scheduler, plans


@examples(150)
@given(st.sampled_from(POLICY_NAMES), actions)
def test_accounts_close_and_the_same_history_gives_the_same_plans(policy, script):
    scheduler, plans = play(policy, script)
    for engine in scheduler.cluster(0.0)["engines"]:
        assert (engine["load_tokens"], engine["load_sequences"]) == (0, 0)
        assert engine["room_tokens"] == 100_000
    assert all(agent["backlog_bytes"] == 0 for agent in scheduler.cluster(0.0)["agents"])
    assert scheduler.cluster(0.0)["open_plans"] == 0
    numbers = [plan.id for plan in plans]
    assert numbers == sorted(set(numbers)), "plan numbers only grow"
    for plan in plans:
        assert plan.keys == keys_of(len(plan.keys)), "a hit is a prefix"
        assert len(plan.reader) == len(plan.keys)
        assert sum(len(share) for share in plan.shares().values()) == len(plan.keys)
    assert play(policy, script)[1] == plans
