"""The directory equals a plain model under any order of announcements, gaps and restarts."""

from __future__ import annotations

import time
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.block import BlockKey, TierName
from common.ids import Incarnation
from common.messages.from_agents import Holding
from scheduler.directory.directory import Directory, Run
from scheduler.directory.holder_sets import Holders
from scheduler.plan import Range
from tests.examples import examples

AGENTS = ("a", "b", "c")


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(32, "big"))


def held(number: int, tier: TierName = TierName.DRAM, is_held: bool = True) -> Holding:
    return Holding(key(number), tier, is_held)


def blocks_of(runs: list[Run]) -> int:
    return sum(run.blocks for run in runs)


class Model:
    """The same contract, written with sets."""

    def __init__(self) -> None:
        self.local: dict[str, set[tuple[int, TierName]]] = {a: set() for a in AGENTS}
        self.remote: set[int] = set()

    def apply(self, agent: str, snapshot: bool, changes: list[tuple[int, TierName, bool]]) -> None:
        if snapshot:
            self.local[agent].clear()
        for number, tier, is_held in changes:
            if tier is TierName.REMOTE:
                (self.remote.add if is_held else self.remote.discard)(number)
            else:
                mine = self.local[agent]
                (mine.add if is_held else mine.discard)((number, tier))

    def holders(self, number: int, alive: set[str]) -> Holders:
        def with_tier(tier: TierName) -> tuple[str, ...]:
            return tuple(a for a in AGENTS if a in alive and (number, tier) in self.local[a])

        return Holders(
            with_tier(TierName.DRAM), with_tier(TierName.SSD), bool(alive) and number in self.remote
        )


changes_of = st.lists(
    st.tuples(st.integers(0, 7), st.sampled_from(list(TierName)), st.booleans()), max_size=6
)
steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["change", "change", "change", "gap", "snapshot", "restart", "report", "forget"]
        ),
        st.sampled_from(AGENTS),
        changes_of,
    ),
    max_size=40,
)


@examples(200)
@given(steps, st.sets(st.sampled_from(AGENTS)), st.sampled_from([1, 1 << 16]))
def test_equals_a_model_under_gaps_and_restarts(steps, alive, sets_min):
    with patch("scheduler.directory.holder_table._SETS_MIN", sets_min):  # 1: unused sets go at once
        equals_a_model(steps, alive)


def equals_a_model(steps, alive):
    directory, model = Directory(), Model()
    incarnation = dict.fromkeys(AGENTS, 1)
    sequence: dict[str, int | None] = dict.fromkeys(AGENTS)
    for action, agent, changes in steps:
        if action == "forget":
            directory.forget(agent)
            model.local[agent].clear()
            sequence[agent] = None
            continue
        if action == "report":
            directory.renewed(agent, Incarnation(incarnation[agent]))
            continue
        if action == "restart":
            incarnation[agent] += 1
        snapshot = action in ("snapshot", "restart")
        expected = snapshot or (action == "change" and sequence[agent] is not None)
        number = 0 if snapshot else (sequence[agent] or 0) + (action == "gap")
        messages = [Holding(key(n), tier, is_held) for n, tier, is_held in changes]
        assert (
            directory.apply(agent, Incarnation(incarnation[agent]), number, snapshot, messages)
            is expected
        )
        if expected:
            model.apply(agent, snapshot, changes)
        sequence[agent] = number + 1 if expected else None
    for n in range(8):
        found = directory.lookup([key(n)], frozenset(alive))
        assert (found[0].holders if found else Holders()) == model.holders(n, alive)
    blocks = []
    for run in directory.lookup([key(n) for n in range(8)], frozenset(alive)):
        assert run.first == len(blocks)
        blocks += [run.holders] * run.blocks
    expected = [model.holders(n, alive) for n in range(8)]
    held_blocks = [bool(h.dram or h.ssd or h.remote) for h in expected]
    assert blocks == expected[: (held_blocks + [False]).index(False)]


def test_an_older_incarnation_changes_nothing():
    directory = Directory()
    assert directory.apply("a", Incarnation(5), 0, True, [held(1)])
    assert not directory.apply("a", Incarnation(4), 0, True, [held(2)])
    assert not directory.apply("a", Incarnation(4), 1, False, [held(2)])
    assert directory.apply("a", Incarnation(5), 1, False, [held(3)])
    assert [bool(directory.lookup([key(n)], frozenset("a"))) for n in (1, 2, 3)] == [
        True,
        False,
        True,
    ]


def test_a_forgotten_incarnation_cannot_come_back():
    directory = Directory()
    assert directory.apply("a", Incarnation(5), 0, True, [held(1)])
    directory.forget("a", incarnation=Incarnation(6))
    assert not directory.apply("a", Incarnation(5), 0, True, [held(1)])
    assert directory.apply("a", Incarnation(6), 0, True, [])
    assert directory.lookup([key(1)], frozenset("a")) == []


def test_remote_outlives_the_agent_that_announced_it():
    directory = Directory()
    directory.apply("a", Incarnation(1), 0, True, [held(1), held(1, TierName.REMOTE)])
    directory.forget("a")
    assert directory.lookup([key(1)], frozenset("b")) == [Run(0, 1, Holders(remote=True))]
    assert directory.lookup([key(1)], frozenset()) == [], "with no agent alive nobody can read it"


def test_lookup_stops_at_the_first_miss():
    directory = Directory()
    directory.apply("a", Incarnation(1), 0, True, [held(n) for n in (0, 1, 3)])
    assert blocks_of(directory.lookup([key(n) for n in range(4)], frozenset("a"))) == 2


def test_the_bound_drops_the_oldest():
    directory = Directory(entries_max=100)
    directory.apply("a", Incarnation(1), 0, True, [held(n) for n in range(250)])
    assert len(directory) <= 100
    assert directory.dropped_total == 250 - len(directory)
    assert directory.lookup([key(0)], frozenset("a")) == []
    assert blocks_of(directory.lookup([key(n) for n in range(240, 250)], frozenset("a"))) == 10
    with pytest.raises(ValueError, match="entries_max"):
        Directory(entries_max=0)


def test_a_long_prompt_is_looked_up_in_milliseconds():
    directory = Directory()
    directory.apply("a", Incarnation(1), 0, True, [held(n, TierName.SSD) for n in range(200_000)])
    wanted = [key(n) for n in range(50_000, 52_000)]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert blocks_of(directory.lookup(wanted, frozenset("ab"))) == 2000
        times.append(time.perf_counter() - start)
    assert min(times) < 0.02, "2,000 keys take about 1 ms; 20 ms leaves room for a busy machine"


@examples(60)
@given(
    st.integers(1, 60),
    st.lists(
        st.tuples(st.sampled_from(AGENTS), st.integers(0, 400), st.integers(1, 120), st.booleans()),
        max_size=30,
    ),
)
def test_the_bound_holds_and_forgets_in_the_order_of_announcement(entries_max, steps):
    """Against a dict in order of announcement that drops its first ones."""
    directory, model = Directory(entries_max), {}
    for agent in AGENTS:
        directory.apply(agent, Incarnation(1), 0, True, [])
    sequence = dict.fromkeys(AGENTS, 1)
    for agent, first, count, is_held in steps:
        for n in range(first, first + count):  # one by one, so that the drops come at one time
            change = held(n, TierName.REMOTE, is_held)
            assert directory.apply(agent, Incarnation(1), sequence[agent], False, [change])
            sequence[agent] += 1
            if is_held:
                model.setdefault(n, None)
            else:
                model.pop(n, None)
            if len(model) > entries_max:
                for old in list(model)[: len(model) - entries_max + entries_max // 16]:
                    del model[old]
            assert len(directory) == len(model) <= entries_max
    found = {n for n in range(520) if directory.lookup([key(n)], frozenset("a"))}
    assert found == set(model)


def test_a_plan_is_expected_range_by_range():
    directory = Directory()
    directory.apply("a", Incarnation(1), 0, True, [held(n, TierName.REMOTE) for n in range(9)])
    keys = [key(n) for n in range(10)]
    parts = [Range(0, 4, "a", TierName.REMOTE), Range(4, 6, "b", TierName.REMOTE)]
    directory.expect_read(keys, parts)
    assert directory.lookup(keys, frozenset("ab")) == [
        Run(0, 4, Holders(dram=("a",), remote=True)),
        Run(4, 5, Holders(dram=("b",), remote=True)),
    ], "a block that nobody has is not expected of anyone"
    directory.expect("b", keys[4:], in_dram=False)
    assert directory.lookup(keys[4:], frozenset("ab")) == [Run(0, 5, Holders(remote=True))]


@pytest.mark.slow
def test_many_blocks_survive_growth_restarts_and_churn_in_little_memory():
    """Blocks move from agent to agent, so that sets of holders come and go as well."""
    directory = Directory(entries_max=200_000)
    alive = frozenset(f"agent-{i}" for i in range(40))
    for i in range(40):
        blocks = range(5000 * i, 5000 * i + 5000)
        changes = [held(n, tier) for n in blocks for tier in (TierName.SSD, TierName.REMOTE)]
        assert directory.apply(f"agent-{i}", Incarnation(1), 0, True, changes)
    assert len(directory) == 200_000
    assert directory.memory_bytes / len(directory) < 26
    directory.forget("agent-7")
    own = [key(n) for n in range(35_000, 40_000)]
    assert directory.lookup(own, alive) == [Run(0, 5000, Holders(remote=True))]
    other = [key(n) for n in range(40_000, 45_000)]
    assert directory.lookup(other, alive) == [Run(0, 5000, Holders(ssd=("agent-8",), remote=True))]
    assert len(directory) == 200_000
    gone = [held(n, TierName.REMOTE, False) for n in range(35_000, 40_000)]
    assert directory.apply("agent-8", Incarnation(1), 1, False, gone)
    assert directory.lookup(own, alive) == [] and len(directory) == 195_000
