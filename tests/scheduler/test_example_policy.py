"""The example of a path policy of one's own."""

from __future__ import annotations

from common.block import TierName
from tests.scheduler.clusters import cluster, hold, request
from tests.scheduler.test_policies import EXAMPLE, REMOTE, Holders, hit_of, readers_of, state_of


def test_a_scheduler_plans_with_it():
    scheduler = cluster(EXAMPLE, prefill=1, decode=1)
    for agent in ("agent-p0", "agent-d0"):
        hold(scheduler, agent, 10, TierName.REMOTE)
    plan = scheduler.plan(request(blocks=10), now=0.0)
    assert plan.shares() == {"agent-p0": plan.keys[:5], "agent-d0": plan.keys[5:]}


def test_each_side_reads_its_half_as_far_as_it_can():
    state = state_of({agent: (0, 1e6) for agent in "pdx"})
    assert readers_of(EXAMPLE, hit_of([REMOTE] * 5), state) == ["p", "p", "d", "d", "d"]
    on_p, on_x = Holders(ssd=("p",)), Holders(dram=("x",))
    assert readers_of(EXAMPLE, hit_of([on_x, REMOTE, on_p, REMOTE]), state) == ["x", "p", "p", "d"]
    alive = frozenset("px")
    assert readers_of(EXAMPLE, hit_of([REMOTE] * 4, alive), state) == ["p", "p"], "d is dead"
