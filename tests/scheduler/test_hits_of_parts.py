"""Hits of models with parts: whole, or shorter, and who reads what of them."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.block import BlockLayout, Part, TierName, part_key
from common.ids import Incarnation
from common.messages.from_agents import Holding
from scheduler.parts import AT_ONCE, longest_hit
from scheduler.plan import PlanRequest
from scheduler.policies import POLICY_NAMES
from scheduler.rows.processes import Device
from scheduler.scheduler import Scheduler
from tests.examples import examples
from tests.scheduler.clusters import BLOCK_BYTES, EVERY_BLOCK, cluster, keys_of, report_agent
from tests.scheduler.clusters import request as plain_request

WINDOW = Part("window", BlockLayout(64, 1, (300,)), 2)
STATE = Part("state", BlockLayout(64, 1, (7000,)), 1)
ALWAYS = msgspec.structs.replace(EVERY_BLOCK, load_policy="always")


def request(blocks: int = 10, parts: tuple[Part, ...] = (WINDOW, STATE), **changes) -> PlanRequest:
    return plain_request(blocks=blocks, parts=parts, **changes)


def hold(
    scheduler: Scheduler,
    agent: str,
    blocks: Iterable[int] = (),
    windows: Iterable[int] = (),
    states: Iterable[int] = (),
    tier: TierName = TierName.SSD,
) -> None:
    keys = keys_of(100)
    held = [keys[block] for block in blocks]
    held += [part_key("window", keys[block]) for block in windows]
    held += [part_key("state", keys[block]) for block in states]
    changes = [Holding(key, tier, True) for key in held]
    assert scheduler.announce(agent, Incarnation(1), 0, True, changes)


@given(st.data())
@examples(200)
def test_the_boundary_is_the_greatest_that_has_everything(data):
    blocks = data.draw(st.sampled_from([0, 1, 5, 17, AT_ONCE - 1, AT_ONCE, 2 * AT_ONCE + 3]))
    spans = data.draw(st.lists(st.sampled_from([1, 2, 3, AT_ONCE + 5]), max_size=3))
    density = data.draw(st.sampled_from([0.0, 0.1, 0.9, 0.99, 1.0]))
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    held = [random.random(blocks) < density for _ in spans]
    needs = [Part("p", BlockLayout(64, 1, (1,)), span) for span in spans]
    right = max(
        b
        for b in range(blocks + 1)
        if all(held[p][list(part.needed(b))].all() for p, part in enumerate(needs))
    )
    assert longest_hit(blocks, spans, lambda p, blocks: held[p][blocks]) == right


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_hit_has_its_parts_and_every_policy_reads_them(policy):
    scheduler = cluster(policy, options=ALWAYS)
    hold(scheduler, "agent-d1", range(9), [2, 3, 6, 7], [3, 7, 8], tier=TierName.REMOTE)
    plan = scheduler.plan(request(), now=0.0)
    assert plan.keys == keys_of(8), "block 9's state is held, but not its window"
    assert (plan.held_blocks, plan.lacking) == (9, "window")
    assert [(part.name, part.blocks) for part in plan.parts] == [("window", [6, 7]), ("state", [7])]
    assert len(plan.reader) == 8 and [len(each) for each in plan.part_readers] == [2, 1]
    wanted = plan.keys + [part_key("window", key) for key in plan.keys[6:]]
    wanted.append(part_key("state", plan.keys[7]))
    shares = plan.shares()
    assert sorted(key for share in shares.values() for key in share) == sorted(wanted)
    sizes = {
        key: size
        for agent, share in shares.items()
        for key, size in zip(share, plan.share_sizes(agent), strict=True)
    }
    assert [sizes[key] for key in wanted] == [BLOCK_BYTES] * 8 + [300, 300, 7000]
    read = sum(nbytes for by_tier in plan.read_bytes().values() for nbytes in by_tier.values())
    assert read == 8 * BLOCK_BYTES + 600 + 7000
    agents = scheduler.state.agents
    promised = sum(agents.promised[agents.row_of[name]] for name in agents.row_of)
    assert promised[Device.STORAGE_NIC] == read
    assert promised[Device.COMPUTE_OUT] == 2 * 8 * BLOCK_BYTES + 600 + 7000
    for agent, share in shares.items():
        assert scheduler.share_settled(plan.id, agent, [True] * len(share), 0.1) == 8
    view = scheduler.explain(plan.id, 0.2)
    assert view is not None and (view["held_blocks"], view["lacking"]) == (9, "window")
    scheduler.finished(plan.id, 1.0)
    assert not sum(agents.promised[agents.row_of[name]] for name in agents.row_of).any()


@pytest.mark.parametrize(
    ("windows", "states", "hit", "lacking"),
    [
        (range(10), range(10), 10, ""),
        (range(10), [], 0, "state"),
        ([], range(10), 0, "window"),
        ([0], [0], 1, "window"),
        ([0, 4, 5, 6, 9], range(10), 7, "window"),
        (range(10), [4], 5, "state"),
    ],
)
def test_a_hit_ends_where_a_boundary_is(windows, states, hit, lacking):
    scheduler = cluster("split", options=ALWAYS)
    hold(scheduler, "agent-p0", range(10), windows, states)
    plan = scheduler.plan(request(), now=0.0)
    assert (len(plan.keys), plan.lacking) == (hit, lacking)
    assert [part.blocks for part in plan.parts] == (
        [list(WINDOW.needed(hit)), list(STATE.needed(hit))] if hit else []
    )


def test_parts_that_only_the_unreachable_have_do_not_count():
    scheduler = cluster("n-way", options=ALWAYS)
    hold(scheduler, "agent-p0", range(10), range(10))
    hold(scheduler, "agent-gone", [], [], range(10))
    assert scheduler.plan(request(), now=0.0).keys == []


def test_a_plain_model_is_planned_as_before():
    scheduler = cluster("split", options=ALWAYS)
    hold(scheduler, "agent-p0", range(10))
    plan = scheduler.plan(request(parts=()), now=0.0)
    assert plan.keys == keys_of(10) and plan.parts == [] and plan.share_sizes("agent-p0") == []
    assert plan.part_readers == [] and plan.lacking == ""


@pytest.mark.parametrize(
    ("missing", "hit"),
    [
        ([], 8),
        ([("window", 7)], 0),
        ([("window", 6)], 0),
        ([("state", 7)], 0),
        ([("", 7)], 0),
    ],
)
def test_what_is_not_in_dram_shortens_the_hit_to_what_is_whole(missing, hit):
    scheduler = cluster("prefill", options=ALWAYS)
    hold(scheduler, "agent-p0", range(8), [6, 7], [7])
    plan = scheduler.plan(request(), now=0.0)
    agent = plan.agents[0]
    in_dram = [(item.part, item.block) not in missing for item in plan.items(agent)]
    assert scheduler.share_settled(plan.id, agent, in_dram, 0.1) == hit
    cut = plan.cut(hit)
    assert len(cut.keys) == hit and [len(each) for each in cut.part_readers] == [
        len(WINDOW.needed(hit)),
        len(STATE.needed(hit)),
    ]
    assert (len(cut.shares()[agent]) == 0) == (hit == 0)


def test_a_short_hit_with_its_whole_window_may_end_earlier():
    scheduler = cluster("prefill", options=ALWAYS)
    wide = msgspec.structs.replace(WINDOW, span_pages=8)
    hold(scheduler, "agent-p0", range(6), range(6))
    plan = scheduler.plan(request(parts=(wide,)), now=0.0)
    assert len(plan.keys) == 6
    in_dram = [item.block < 4 for item in plan.items("agent-p0")]
    assert scheduler.share_settled(plan.id, plan.agents[0], in_dram, 0.1) == 4
    assert plan.cut(4).parts[0].blocks == [0, 1, 2, 3]


def test_a_missing_object_is_not_planned_again():
    scheduler = cluster("prefill", options=ALWAYS)
    hold(scheduler, "agent-p0", range(8), [6, 7], [7], tier=TierName.DRAM)
    first = scheduler.plan(request(), now=0.0)
    in_dram = [item.part != "state" for item in first.items("agent-p0")]
    assert scheduler.share_settled(first.id, "agent-p0", in_dram, 0.1) == 0
    assert scheduler.plan(request(rid="again"), now=0.2).lacking == "state"


def test_a_reader_without_room_for_the_parts_gets_a_shorter_hit():
    scheduler = cluster("prefill", prefill=1, decode=1, options=ALWAYS)
    report_agent(scheduler, "agent-p0", dram_slots=8)
    hold(scheduler, "agent-p0", range(8), range(8), range(8))
    plan = scheduler.plan(request(), now=0.0)
    assert 0 < len(plan.keys) and sum(plan.share_items(a) for a in plan.agents) <= 8
    assert len(plan.part_readers[0]) == min(2, len(plan.keys))
