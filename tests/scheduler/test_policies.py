"""Read assignment: what every policy promises, and what each is for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.cluster_state import ClusterState
from scheduler.directory.directory import Run
from scheduler.directory.holder_sets import Holders
from scheduler.hit import Hit, last_byte_s
from scheduler.options import SchedulerOptions
from scheduler.policies import POLICY_NAMES, UnknownPolicy, read_policy
from scheduler.scheduler import Scheduler
from tests.examples import examples
from tests.scheduler.clusters import BLOCK_BYTES, state_of

AGENTS = ("p", "d", "x")
ALL = frozenset(AGENTS)
EXAMPLE = "examples.halves:Halves"
"""A policy of one's own."""


def hit_of(holders: list[Holders], alive: frozenset[str] = ALL, decode: str = "d") -> Hit:
    runs: list[Run] = []
    for block, held in enumerate(holders):
        if runs and runs[-1].holders == held:
            runs[-1] = Run(runs[-1].first, runs[-1].blocks + 1, held)
        else:
            runs.append(Run(block, 1, held))
    return Hit(runs, "p", decode, alive, BLOCK_BYTES)


def readers_of(policy: str, hit: Hit, state: ClusterState) -> list[str]:
    """The reader of each block."""
    readers: list[str] = []
    for part in read_policy(policy).assign(hit, state):
        assert part.first == len(readers) and part.blocks > 0, "in order, each block once"
        readers += [part.agent] * part.blocks
    return readers


def holders_of(hit: Hit) -> list[Holders]:
    return [run.holders for run in hit.runs for _ in range(run.blocks)]


EQUAL = {name: (0, 1e6) for name in AGENTS}
REMOTE = Holders(remote=True)

some_agents = st.sets(st.sampled_from(AGENTS)).map(lambda s: tuple(sorted(s)))
some_holders = st.builds(Holders, some_agents, some_agents, st.booleans())
queues = st.fixed_dictionaries(
    {
        name: st.tuples(st.integers(0, 200_000), st.sampled_from([0.0, 1e3, 1e5, 3e6]))
        for name in AGENTS
    }
)


@st.composite
def hits(draw: st.DrawFn) -> Hit:
    alive = frozenset(draw(st.sets(st.sampled_from(AGENTS))))
    raw = draw(st.lists(some_holders, max_size=30))
    seen = []
    for holders in raw:  # as the directory gives them: only the living, no block without a holder
        kept = Holders(
            tuple(a for a in holders.dram if a in alive),
            tuple(a for a in holders.ssd if a in alive),
            holders.remote and bool(alive),
        )
        if kept == Holders():
            break
        seen.append(kept)
    return hit_of(seen, alive, draw(st.sampled_from(["d", "p"])))


@examples(300)
@given(hits(), queues, st.sampled_from((*POLICY_NAMES, EXAMPLE)))
def test_every_block_goes_to_one_living_agent_that_can_have_it(hit, queues, name):
    state = state_of({agent: queues[agent] for agent in hit.alive})
    readers, holders = readers_of(name, hit, state), holders_of(hit)
    assert len(readers) <= len(holders)
    for held, reader in zip(holders, readers, strict=False):
        assert reader in hit.alive
        assert held.tier_at(reader) is not None
    if len(readers) < len(holders):
        unread = holders[len(readers)]
        assert not unread.dram and not unread.ssd, "a block with a holder always has a reader"
    assert readers_of(name, hit, state) == readers, "the same question, the same answer"


@examples(400)
@given(hits(), queues, st.sampled_from([1, 4]))
def test_dividing_ends_no_later_than_the_papers_rule(hit, queues, range_min_blocks):
    if hit.sides:
        options = SchedulerOptions(range_min_blocks=range_min_blocks)
        state = state_of({agent: queues[agent] for agent in hit.alive}, options)
        policies = ("split", "n-way", "shorter-queue")
        ends = [last_byte_s(hit, read_policy(name).assign(hit, state), state) for name in policies]
        assert max(ends[:2]) <= ends[2] * (1 + 1e-9)


@examples(200)
@given(st.integers(1, 400), st.lists(st.floats(1e3, 1e7), min_size=3, max_size=3))
def test_a_faster_reader_never_gets_less(blocks, rates):
    hit = hit_of([REMOTE] * blocks)
    state = state_of({name: (0, rate) for name, rate in zip(AGENTS, rates, strict=True)})
    readers = readers_of("n-way", hit, state)
    shares = sorted((rate, readers.count(n)) for n, rate in zip(AGENTS, rates, strict=True))
    assert [share for _, share in shares] == sorted(share for _, share in shares)


def test_n_way_reads_with_every_agent_and_keeps_ranges_long():
    hit = hit_of([REMOTE] * 90)
    assert readers_of("n-way", hit, state_of(EQUAL)) == ["p"] * 30 + ["d"] * 30 + ["x"] * 30
    busy = EQUAL | {"p": (10**6, 1e6)}
    assert readers_of("n-way", hit, state_of(busy)) == ["d"] * 45 + ["x"] * 45
    long_ranges = SchedulerOptions(range_min_blocks=40)
    parts = read_policy("n-way").assign(hit, state_of(EQUAL, long_ranges))
    assert len(parts) == 2 and min(part.blocks for part in parts) >= 40


def test_an_ssd_reads_beside_its_nodes_storage_nic():
    hit = hit_of([Holders(ssd=("d",), remote=True)] * 30 + [REMOTE] * 60)
    readers = readers_of("n-way", hit, state_of(EQUAL))
    assert readers[30:].count("d") == 20, "three storage NICs"
    assert readers[:30].count("d") == pytest.approx(23, abs=1), "and an idle SSD beside them"
    slow_network = EQUAL | {"d": (0, 1e6)}
    ssd_only = hit_of([Holders(ssd=("d",))] * 30)
    assert readers_of("n-way", ssd_only, state_of(slow_network)) == ["d"] * 30


def test_split_divides_in_contiguous_ranges_by_rate_and_backlog():
    hit = hit_of([REMOTE] * 90)
    assert readers_of("split", hit, state_of(EQUAL)) == ["p"] * 45 + ["d"] * 45
    twice = EQUAL | {"p": (0, 2e6)}
    assert readers_of("split", hit, state_of(twice)) == ["p"] * 60 + ["d"] * 30
    behind = EQUAL | {"p": (30 * BLOCK_BYTES, 1e6)}
    assert readers_of("split", hit, state_of(behind)) == ["d"] * 60 + ["p"] * 30


def test_split_uses_both_devices_of_a_side():
    hit = hit_of([Holders(ssd=("d",))] * 30 + [REMOTE] * 30)
    readers = readers_of("split", hit, state_of(EQUAL))
    assert readers[:30] == ["d"] * 30
    assert readers[30:].count("p") == 15, "d's storage NIC is idle while its SSD reads"


def test_shorter_queue_gives_the_whole_read_to_one_side():
    hit = hit_of([REMOTE] * 10)
    assert readers_of("shorter-queue", hit, state_of(EQUAL | {"p": (1, 1e6)})) == ["d"] * 10
    assert readers_of("shorter-queue", hit, state_of(EQUAL | {"d": (1, 1e6)})) == ["p"] * 10
    slow = {"p": (100, 1e3), "d": (1000, 1e6), "x": (0, 1e6)}
    assert readers_of("shorter-queue", hit, state_of(slow)) == ["d"] * 10, (
        "seconds count, not bytes"
    )


def test_dram_is_delivered_without_a_read_by_the_nearest():
    hit = hit_of(
        [Holders(dram=("d", "p")), Holders(dram=("d", "x")), Holders(dram=("x",), remote=True)]
    )
    for name in ("shorter-queue", "split"):
        assert readers_of(name, hit, state_of(EQUAL)) == ["p", "d", "x"]


def test_basic_reads_on_its_own_side_and_falls_back_to_a_holder():
    blocks = [Holders(dram=("d",), remote=True), Holders(dram=("x",)), Holders(ssd=("d", "x"))]
    busy_x = state_of(EQUAL | {"x": (5, 1e6)})
    assert readers_of("prefill", hit_of(blocks), busy_x) == ["p", "x", "d"]
    assert readers_of("decode", hit_of(blocks), busy_x) == ["d", "x", "d"]


def test_a_dead_side_does_not_read():
    alive = frozenset({"d"})
    for name, expected in (("split", ["d"] * 4), ("shorter-queue", ["d"] * 4), ("prefill", [])):
        assert readers_of(name, hit_of([REMOTE] * 4, alive), state_of({"d": (0, 1e6)})) == expected


def test_where_neither_side_may_read_another_agent_does():
    others = frozenset({"x", "y"})
    state = state_of({"x": (5, 1e6), "y": (0, 1e6)})
    blocks = [Holders(ssd=("x",), remote=True), REMOTE, REMOTE]
    assert readers_of("shorter-queue", hit_of(blocks, others), state) == ["y"] * 3
    assert set(readers_of("split", hit_of(blocks, others), state)) <= others
    assert readers_of("prefill", hit_of(blocks, others), state) == ["x"], "it has its side alone"
    assert readers_of("shorter-queue", hit_of([REMOTE], frozenset()), state_of({})) == []


@pytest.mark.parametrize(
    "name",
    [
        *("os:getcwd", "time:time", "os:abort", "os:_exit", "collections:Counter"),
        *("no.such:Class", "os:no_such", "os:", "scheduler.policies:ReadPolicy"),
    ],
)
def test_what_is_no_policy_is_not_called(name):
    with pytest.raises(UnknownPolicy):
        read_policy(name)


def test_no_product_has_the_oracle():
    with pytest.raises(UnknownPolicy):
        read_policy("oracle")


def test_an_unknown_policy_names_the_choices():
    with pytest.raises(
        UnknownPolicy, match="prefill, decode, round-robin, shorter-queue, split, n-way"
    ):
        Scheduler("quickest")
