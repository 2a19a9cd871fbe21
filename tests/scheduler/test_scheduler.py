"""The facade: placement, promises, cuts, and accounts that close."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from benchmarks.testbed.oracle import ORACLE_CLASS
from common.block import BlockKey, TierName
from common.ids import Incarnation, PlanId
from common.messages.from_agents import Holding
from common.prefill_cost import PrefillCost
from scheduler.open_plans import UnknownPlan
from scheduler.options import SchedulerOptions
from scheduler.plan import NoEngine
from scheduler.scheduler import Scheduler
from tests.scheduler.clusters import (
    BLOCK_BYTES,
    PAGE_TOKENS,
    cluster,
    hold,
    keys_of,
    report_agent,
    report_engine,
    request,
)


def loads(scheduler: Scheduler, now: float = 0.0) -> list[tuple]:
    view = scheduler.cluster(now)
    engines = [
        (e["name"], e["load_tokens"], e["load_sequences"], e["room_tokens"])
        for e in view["engines"]
    ]
    return engines + [(a["name"], a["backlog_bytes"]) for a in view["agents"]]


def test_requests_between_two_reports_spread():
    scheduler = cluster(prefill=3, decode=3)
    plans = [scheduler.plan(request(str(i)), now=0.0) for i in range(6)]
    for side in ("prefill", "decode"):
        chosen = [getattr(p, side) for p in plans]
        assert sorted(chosen) == sorted([*set(chosen)] * 2) and len(set(chosen)) == 3, (
            f"{side}: two each"
        )


def test_a_new_read_goes_to_the_side_that_was_not_promised_one():
    scheduler = cluster("shorter-queue", prefill=1, decode=1)
    hold(scheduler, "agent-p0", 40, TierName.REMOTE)
    readers = []
    for i in range(4):
        keys = keys_of(40)[10 * i : 10 * i + 10]
        readers.append(scheduler.plan(request(str(i), keys=keys), now=0.0).agents)
    assert readers == [["agent-p0"], ["agent-d0"], ["agent-p0"], ["agent-d0"]]


def test_blocks_that_are_being_read_are_not_read_by_another():
    scheduler = cluster("shorter-queue", prefill=1, decode=1)
    hold(scheduler, "agent-p0", 10, TierName.REMOTE)
    first, second = (scheduler.plan(request(str(i)), now=0.0) for i in range(2))
    assert first.agents == second.agents == ["agent-p0"]
    assert first.read_bytes()["agent-p0"] and not any(second.read_bytes().values())
    # The read fails: the block is asked for from remote again, not from that agent's DRAM.
    scheduler.share_settled(first.id, "agent-p0", [True] * 9 + [False], now=0.1)
    third = scheduler.plan(request("3"), now=0.2)
    assert [(part.blocks, part.tier) for part in third.ranges] == [
        (9, TierName.DRAM),
        (1, TierName.REMOTE),
    ]


def test_decode_needs_room_and_an_idle_engine_always_fits():
    scheduler = cluster(prefill=1)
    report_engine(scheduler, "d0", sequences=1, free_tokens=100)
    report_engine(scheduler, "d1", sequences=5)
    assert scheduler.plan(request(), now=0.0).decode == "d1"
    report_engine(scheduler, "d1", sequences=5, free_tokens=100)
    with pytest.raises(NoEngine, match="657 KV tokens needed, 100 free") as full:
        scheduler.plan(request(), now=0.0)
    assert full.value.transient
    report_engine(scheduler, "d0", sequences=0, free_tokens=100)
    assert scheduler.plan(request(), now=0.0).decode == "d0"


def test_a_prefill_engine_beyond_beta_takes_nothing():
    scheduler = cluster()
    cost = PrefillCost(0.0, 1e-3, 0.0)
    report_engine(scheduler, "p0", pending_tokens=5001, prefill_cost=cost)
    report_engine(scheduler, "p1", pending_tokens=4999, prefill_cost=cost)
    assert scheduler.plan(request(), now=0.0).prefill == "p1"
    with pytest.raises(NoEngine, match="5001 tokens pend") as full:
        scheduler.plan(request(), now=0.0)
    assert full.value.transient, "the global queue keeps it"


def test_a_short_read_queue_comes_before_fewer_tokens():
    scheduler = cluster()
    report_engine(scheduler, "p1", pending_tokens=100)
    assert scheduler.plan(request("1"), now=0.0).prefill == "p0"
    report_agent(scheduler, "agent-p0", read_queue_bytes={TierName.REMOTE: 3_000_001})
    assert scheduler.plan(request("2"), now=0.0).prefill == "p1", "more than 3 s behind"


def test_where_all_read_queues_are_long_the_much_longer_one_gets_nothing():
    scheduler = cluster()
    report_engine(scheduler, "p1", pending_tokens=100)
    queued = {"agent-p0": 9_500_000, "agent-p1": 6_000_000}
    for agent, nbytes in queued.items():
        report_agent(scheduler, agent, read_queue_bytes={TierName.REMOTE: nbytes})
    assert scheduler.plan(request("1"), now=0.0).prefill == "p1", "more than 3 s less"
    report_agent(scheduler, "agent-p0", read_queue_bytes={TierName.REMOTE: 8_500_000})
    assert scheduler.plan(request("2"), now=0.0).prefill == "p0", "about alike: fewer tokens"


def test_round_robin_takes_engines_in_turns_and_both_sides_of_each_decode_engine():
    scheduler = cluster("round-robin", prefill=1, decode=2)
    readers = []
    for number in range(8):
        # Blocks of its own: what an earlier plan has brought to DRAM is read by nobody.
        keys = [BlockKey(bytes([number + 1]) * 32)]
        held = [Holding(key, TierName.REMOTE, True) for key in keys]
        assert scheduler.announce("agent-p0", Incarnation(1), number, number == 0, held)
        plan = scheduler.plan(request(str(number), 1, keys=keys), now=0.0)
        readers.append((plan.decode, plan.ranges[0].agent))
    assert Counter(readers) == {
        ("d0", "agent-p0"): 2,
        ("d0", "agent-d0"): 2,
        ("d1", "agent-p0"): 2,
        ("d1", "agent-d1"): 2,
    }


def test_decode_engines_of_a_group_are_balanced_within_z_of_its_mean():
    scheduler = cluster(prefill=1, decode=0)
    for name, tokens, sequences in (("d0", 5000, 9), ("d1", 4800, 3), ("d2", 8000, 1)):
        report_engine(scheduler, name, context_tokens=tokens, sequences=sequences, group="g")
        report_agent(scheduler, f"agent-{name}")
    assert scheduler.plan(request(), now=0.0).decode == "d1", "d2 holds more than 1.05 x the mean"
    report_engine(scheduler, "d3", context_tokens=9000, sequences=1, group="h")
    assert scheduler.plan(request(), now=0.0).decode == "d3", "the group with the fewest tokens"


def test_avoided_engines_are_the_last_resort():
    scheduler = cluster(prefill=2, decode=1)
    away = frozenset({"p0", "d0"})
    plans = [scheduler.plan(request(str(i), avoided=away), now=0.0) for i in range(3)]
    assert {(p.prefill, p.decode) for p in plans} == {("p1", "d0")}


def test_a_drained_node_gets_nothing_new():
    scheduler = cluster("n-way")
    hold(scheduler, "agent-p1", 10, TierName.REMOTE)
    running = scheduler.plan(request(), now=0.0)
    for name in ("p0", "agent-p0"):
        scheduler.drain(name, True)
    plans = [scheduler.plan(request(str(i)), now=0.0) for i in range(4)]
    assert {p.prefill for p in plans} == {"p1"}
    assert not any("agent-p0" in p.agents for p in plans if p.read_bytes())
    scheduler.finished(running.id, now=0.0)
    scheduler.drain("p0", False)
    assert scheduler.plan(request("9"), now=0.0).prefill == "p0"


def test_a_hit_that_would_be_slower_than_a_miss_is_recomputed():
    scheduler = cluster("prefill", prefill=1, decode=1)
    hold(scheduler, "agent-p0", 10, TierName.REMOTE)
    fast = PrefillCost(0.0, 1e-6, 0.0)
    report_engine(scheduler, "p0", prefill_cost=fast)
    report_agent(scheduler, "agent-p0", read_queue_bytes={TierName.REMOTE: 1_000_000})
    plan = scheduler.plan(request(), now=0.0)
    assert plan.keys == [], "0.64 ms of computing against a second of waiting"
    view = scheduler.explain(plan.id, now=1.0)
    assert view["load"]["hit_blocks"] == 10 and view["load"]["load_blocks"] == 0
    scheduler.finished(plan.id, now=0.0)
    slow = PrefillCost(0.0, 1.0, 0.0)
    report_engine(scheduler, "p0", prefill_cost=slow)
    assert len(scheduler.plan(request(), now=0.0).keys) == 10


@pytest.mark.parametrize("window_tokens, hit", [(0, 10), (32, 0)])
def test_layers_with_a_window_make_less_of_a_hit_worth_loading(window_tokens, hit):
    """A second of waiting, against the pairs of ten blocks: 2 s of all, 0.2 s of windows."""
    scheduler = cluster("prefill", prefill=1, decode=1)
    hold(scheduler, "agent-p0", 10, TierName.REMOTE)
    cost = PrefillCost(0.0, 0.0, 0.0, window_pair_s=1e-5, window_tokens=window_tokens)
    if not window_tokens:
        cost = PrefillCost(0.0, 0.0, 1e-5)
    report_engine(scheduler, "p0", prefill_cost=cost)
    report_agent(scheduler, "agent-p0", read_queue_bytes={TierName.REMOTE: 1_000_000})
    assert len(scheduler.plan(request(), now=0.0).keys) == hit


def test_part_of_a_hit_may_be_worth_loading():
    """Loading a block takes 1 ms, computing its tokens 0.7 ms while nothing pends, but 2 s of
    other prompts come first: as much is loaded as that time allows."""
    scheduler = cluster("prefill", prefill=1, decode=1)
    hold(scheduler, "agent-p0", 4000, TierName.REMOTE)
    report_agent(scheduler, "agent-p0", dram_slots=5000)
    cost = PrefillCost(0.0, 0.7e-3 / PAGE_TOKENS, 0.0)
    report_engine(scheduler, "p0", pending_tokens=182_857, prefill_cost=cost)
    plan = scheduler.plan(request(blocks=4000), now=0.0)
    assert len(plan.keys) == pytest.approx(2000, abs=4000 / 32)


@pytest.mark.parametrize("load_policy, hit", [("never", 0), ("always", 10)])
def test_load_policy_can_be_fixed(load_policy, hit):
    scheduler = cluster("prefill", 1, 1, SchedulerOptions(load_policy=load_policy))
    hold(scheduler, "agent-p0", 10, TierName.REMOTE)
    report_engine(scheduler, "p0", prefill_cost=PrefillCost(0.0, 1e-9, 0.0))
    assert len(scheduler.plan(request(), now=0.0).keys) == hit


def test_a_plan_can_be_explained():
    scheduler = cluster("n-way")
    hold(scheduler, "agent-p1", 10, TierName.REMOTE)
    plan = scheduler.plan(request("why"), now=0.0)
    view = scheduler.explain(plan.id, now=1.0)
    assert view == scheduler.explain("why", now=1.0)
    assert json.loads(json.dumps(view))["prefill"]["chosen"] == plan.prefill
    assert {c["name"] for c in view["prefill"]["candidates"]} == {"p0", "p1"}
    assert len(view["agents"]) == 4 and sum(a["read_bytes"] for a in view["agents"]) == 10_000
    assert scheduler.explain(PlanId(0), now=1.0) is None


def test_the_oracle_reads_nothing():
    scheduler = cluster(ORACLE_CLASS)
    hold(scheduler, "agent-p1", 10, TierName.REMOTE)
    plan = scheduler.plan(request(), now=0.0)
    assert plan.experiment.zero_io and len(plan.keys) == 10 and plan.estimated_read_s == 0
    assert all(agent["backlog_bytes"] == 0 for agent in scheduler.cluster(0.0)["agents"])


def test_a_slow_measurement_fades_unless_it_is_confirmed():
    scheduler = cluster("n-way", prefill=1, decode=1)
    rates = {TierName.SSD: 1e6, TierName.REMOTE: 1e4}
    report_agent(scheduler, "agent-p0", read_bytes_per_s=rates)

    def rate(now: float) -> float:
        report_agent(scheduler, "agent-p0", now, read_bytes_per_s=rates)
        return scheduler.cluster(now)["agents"][0]["read_bytes_per_s"]["remote"]

    assert rate(1.0) == rate(4.9) == 1e4
    assert rate(30.0) > 1e5


def test_no_engine_says_why():
    scheduler = cluster(prefill=1)
    with pytest.raises(NoEngine, match=r"may go to none.*p0") as failed:
        scheduler.plan(request(excluded=frozenset({"p0"})), now=0.0)
    assert not failed.value.transient
    with pytest.raises(NoEngine, match=r"no prefill engine.*none is alive"):
        scheduler.plan(request(), now=60.0)
    report_engine(scheduler, "p0", now=60.0)
    with pytest.raises(NoEngine, match="no decode engine"):
        scheduler.plan(request(), now=60.0)


def test_a_silent_agent_is_not_read_from_until_it_speaks_again():
    scheduler = cluster("prefill", prefill=1, decode=1)
    hold(scheduler, "agent-p0", 10, TierName.SSD)
    for name in ("p0", "d0"):
        report_engine(scheduler, name, now=10.0)
    assert scheduler.plan(request(), now=10.0).keys == []
    report_agent(scheduler, "agent-p0", now=10.0)
    assert len(scheduler.plan(request(), now=10.0).keys) == 10


def test_a_restarted_agent_holds_nothing_until_it_announces_it():
    scheduler = cluster("prefill", prefill=1, decode=1)
    hold(scheduler, "agent-p0", 10, TierName.SSD)
    report_agent(scheduler, "agent-p0", incarnation=2)
    assert scheduler.plan(request(), now=0.0).keys == []
    assert not scheduler.announce("agent-p0", Incarnation(1), 1, False, [])
    assert scheduler.announce(
        "agent-p0", Incarnation(2), 0, True, [Holding(keys_of(1)[0], TierName.SSD, True)]
    )
    assert len(scheduler.plan(request(), now=0.0).keys) == 1


def test_what_a_restarted_agent_announces_before_its_first_report_stands():
    """An agent reports to subscribers only, and what those get first is a snapshot."""
    scheduler = cluster("prefill", prefill=1, decode=1)
    hold(scheduler, "agent-p0", 10, TierName.SSD)
    snapshot = [Holding(key, TierName.SSD, True) for key in keys_of(7)]
    assert scheduler.announce("agent-p0", Incarnation(2), 0, True, snapshot)
    report_agent(scheduler, "agent-p0", incarnation=2)
    assert len(scheduler.plan(request(), now=0.0).keys) == 7
    assert scheduler.announce("agent-p0", Incarnation(2), 1, False, [])


def test_the_hit_ends_where_the_readers_memory_does():
    scheduler = cluster("prefill", prefill=1, decode=1)
    hold(scheduler, "agent-p0", 10, TierName.SSD)
    report_agent(scheduler, "agent-p0", dram_slots=4)
    plan = scheduler.plan(request(), now=0.0)
    assert plan.keys == keys_of(4)
    assert plan.read_bytes() == {"agent-p0": {TierName.SSD: 4 * BLOCK_BYTES}}


def test_without_cache_everything_is_computed():
    scheduler = cluster(prefill=1, decode=1)
    hold(scheduler, "agent-p0", 10, TierName.DRAM)
    plan = scheduler.plan(request(use_cache=False), now=0.0)
    assert (plan.keys, plan.agents, plan.read_bytes()) == ([], [], {})


def test_the_hit_is_cut_at_the_first_block_that_is_not_in_dram():
    scheduler = cluster("split", prefill=1, decode=1)
    hold(scheduler, "agent-p0", 10, TierName.REMOTE)
    plan = scheduler.plan(request(), now=0.0)
    shares = plan.shares()
    assert {a: len(k) for a, k in shares.items()} == {"agent-p0": 5, "agent-d0": 5}
    assert scheduler.share_settled(plan.id, "agent-d0", [True, True, False], now=0.1) == 7
    assert scheduler.share_settled(plan.id, "agent-p0", [True] * 5, now=0.2) == 7
    cut = plan.cut(7)
    assert cut.keys == keys_of(7) and {a: len(k) for a, k in cut.shares().items()} == {
        "agent-p0": 5,
        "agent-d0": 2,
    }
    p0 = scheduler.cluster(0.2)["engines"][0]
    assert p0["load_tokens"] == 1 + 3 * PAGE_TOKENS, "what is no hit any more is computed"
    assert scheduler.share_settled(plan.id, "agent-p0", [], now=0.3) == 0, "given up"
    scheduler.finished(plan.id, now=0.4)
    with pytest.raises(UnknownPlan):
        scheduler.share_settled(plan.id, "agent-p0", [True] * 5, now=0.5)


def test_a_promise_ends_with_the_report_that_shows_it():
    scheduler = cluster(prefill=1, decode=1)
    plan = scheduler.plan(request(), now=0.0)
    report_engine(scheduler, "d0", now=1.0)
    assert ("d0", 0, 1, 100_000 - 657) in loads(scheduler), "not yet posted: still promised"
    scheduler.submitted(plan.id, now=1.0)
    report_engine(scheduler, "d0", now=1.1, sequences=1)
    assert ("d0", 0, 2, 100_000 - 657) in loads(scheduler), "written before it was posted?"
    report_engine(scheduler, "d0", now=1.3, sequences=1, free_tokens=99_000)
    assert ("d0", 0, 1, 99_000) in loads(scheduler)


def test_policy_can_be_changed_while_running():
    scheduler = cluster("prefill", prefill=1, decode=1)
    hold(scheduler, "agent-p0", 10, TierName.REMOTE)
    assert scheduler.plan(request(), now=0.0).agents == ["agent-p0"]
    scheduler.set_policy("decode")
    assert scheduler.plan(request(), now=0.0).agents == ["agent-d0"]
    assert scheduler.cluster(0.0)["policy"] == "decode"
