"""What is evicted first, whatever was used, added and taken out before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.block import NO_PARENT, BlockKey
from storage.index.index import BlockIndex
from storage.index.use_counts import UseCounts
from tests.examples import examples
from tests.storage.conftest import key_of

CHAINS = [[key_of(100 * chain + i) for i in range(6)] for chain in range(4)]
KEYS = [key for chain in CHAINS for key in chain]
PARENT_OF = {k: p for chain in CHAINS for p, k in zip([NO_PARENT, *chain], chain, strict=False)}


def all_idle(key: BlockKey) -> bool:
    return True


def chain_index(*chains: list[BlockKey]) -> BlockIndex:
    index = BlockIndex()
    for chain in chains:
        for key in chain:
            index.add(key, 0, PARENT_OF[key])
    return index


def evict(index: BlockIndex, count: int) -> list[BlockKey]:
    gone = []
    for key in index.victims(all_idle):
        index.pop(key)
        gone.append(key)
        if len(gone) == count:
            break
    return gone


def test_a_prefix_goes_from_its_end() -> None:
    index = chain_index(CHAINS[0])
    assert evict(index, 6) == CHAINS[0][::-1]


def test_the_prefix_used_longest_ago_goes_first() -> None:
    index = chain_index(CHAINS[0], CHAINS[1], CHAINS[2])
    index.touch(CHAINS[0])
    gone = evict(index, 12)
    assert set(gone[:6]) == set(CHAINS[1]) and set(gone[6:]) == set(CHAINS[2])


def test_what_was_used_before_outlives_what_is_new() -> None:
    index = chain_index(CHAINS[0], CHAINS[1])
    for _ in range(5):
        index.touch(CHAINS[0])
    for key in CHAINS[2]:
        index.add(key, 0, PARENT_OF[key])
    assert set(evict(index, 12)) == {*CHAINS[1], *CHAINS[2]}


def test_an_evicted_block_that_returns_is_remembered() -> None:
    index = chain_index(CHAINS[0])
    for _ in range(3):
        index.touch(CHAINS[0])
    evict(index, 6)
    for chain in (CHAINS[2], CHAINS[3], CHAINS[0], CHAINS[1]):
        for key in chain:
            index.add(key, 0, PARENT_OF[key])
    assert set(evict(index, 18)) == {*CHAINS[1], *CHAINS[2], *CHAINS[3]}


def test_a_child_that_came_before_its_parent_still_protects_it() -> None:
    index = BlockIndex()
    for key in reversed(CHAINS[0]):
        index.add(key, 0, PARENT_OF[key])
    assert evict(index, 6) == CHAINS[0][::-1]


def test_only_some_groups_go() -> None:
    index = BlockIndex()
    for group, chain in enumerate(CHAINS):
        for key in chain:
            index.add(key, 0, PARENT_OF[key], group)
    index.touch(CHAINS[1])
    gone = []
    for key in index.victims(all_idle, {1, 3}):
        index.pop(key)
        gone.append(key)
    assert set(gone[:6]) == set(CHAINS[3]) and set(gone) == {*CHAINS[1], *CHAINS[3]}


def test_an_idle_parent_goes_if_no_leaf_is_idle() -> None:
    index = chain_index(CHAINS[0])
    idle = {CHAINS[0][2]}
    assert list(index.victims(idle.__contains__)) == [CHAINS[0][2]]


def test_counts_age_and_survive_growth() -> None:
    counts, chance = UseCounts(), np.random.default_rng(5)
    for _ in range(5):
        counts.count(KEYS)
    counts.make_room(10_000)
    assert (counts.estimate(KEYS) >= 5).all() and not counts.estimate([key_of(9_999)])[0]
    for _ in range(400):
        drawn = chance.bytes(32 * 1000)
        counts.count([BlockKey(drawn[at : at + 32]) for at in range(0, len(drawn), 32)])
    assert counts.estimate(KEYS).mean() < 4


class IndexMachine(RuleBasedStateMachine):
    """Beside a plain model: a set of keys, and which of them have children here."""

    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex()
        self.held: dict[BlockKey, tuple[int, int]] = {}
        self.places = 0
        self.retired: set[BlockKey] = set()

    @rule(key=st.sampled_from(KEYS), group=st.integers(0, 2))
    def add(self, key: BlockKey, group: int) -> None:
        if key not in self.held:
            self.places += 1
            self.index.add(key, self.places, PARENT_OF[key], group)
            self.held[key] = self.places, group

    @rule(key=st.sampled_from(KEYS))
    def pop(self, key: BlockKey) -> None:
        place, _ = self.held.pop(key, (None, 0))
        self.retired.discard(key)
        assert self.index.pop(key) == place

    @rule(chain=st.sampled_from(CHAINS), length=st.integers(1, 6))
    def touch(self, chain: list[BlockKey], length: int) -> None:
        self.index.touch(chain[:length])
        self.retired -= {*chain[:length]}

    @rule(keys=st.sets(st.sampled_from(KEYS)))
    def retire(self, keys: set[BlockKey]) -> None:
        self.index.touch([], sorted(keys))
        self.retired |= {key for key in keys & self.held.keys() if self.index.uses(key) <= 2}

    @rule(keys=st.sets(st.sampled_from(KEYS)))
    def refresh(self, keys: set[BlockKey]) -> None:
        self.index.refresh(sorted(keys))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), count=st.integers(1, 5))
    def evict(self, data: st.DataObject, count: int) -> None:
        busy = data.draw(st.sets(st.sampled_from(sorted(self.held))))
        groups = data.draw(st.none() | st.sets(st.integers(0, 2), min_size=1))
        for key in self.index.victims(lambda key: key not in busy, groups):
            able = {
                key
                for key, (_, group) in self.held.items()
                if key not in busy and (groups is None or group in groups)
            }
            assert key in able
            parents = {PARENT_OF[key] for key in self.held}
            leaves = able - parents
            assert key in leaves or not leaves
            assert key in self.retired or not leaves & self.retired
            self.pop(key)
            count -= 1
            if not count:
                return
        left = {k for k, (_, g) in self.held.items() if groups is None or g in groups}
        assert left <= busy, "something idle was not offered"

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        assert len(self.index) == len(self.held) and set(self.index) == set(self.held)
        assert {key: self.index.get(key) for key in KEYS} == {
            key: self.held.get(key, (None,))[0] for key in KEYS
        }
        for group in range(3):
            expected = {key for key, (_, g) in self.held.items() if g == group}
            assert set(self.index.of_groups({group})) == expected


TestIndex = IndexMachine.TestCase
TestIndex.settings = examples(60, stateful_step_count=40)


@pytest.mark.parametrize("known_parents", [True, False])
def test_a_loaded_index_evicts_the_oldest_first(known_parents: bool) -> None:
    index = BlockIndex()
    parents = [PARENT_OF[key] if known_parents else NO_PARENT for key in KEYS]
    index.load(KEYS, np.arange(len(KEYS)), parents, np.zeros(len(KEYS), np.int32))
    gone = evict(index, len(KEYS))
    assert gone == ([k for c in CHAINS for k in c[::-1]] if known_parents else KEYS)


def test_blocks_added_at_once_are_as_those_added_one_by_one() -> None:
    index = BlockIndex()
    index.add(CHAINS[0][1], 7, CHAINS[0][0])
    index.add_many([], np.empty(0, np.int64), 0)
    index.add_many(CHAINS[1] + [CHAINS[0][0]], np.arange(7), 3)
    assert [index.get(key) for key in CHAINS[1]] == list(range(6)) and len(index) == 8
    assert index.group(CHAINS[1][0]) == 3 and index.between(6, 8) == [CHAINS[0][1], CHAINS[0][0]]
    assert evict(index, 8)[:2] == [CHAINS[0][1], CHAINS[1][0]], "a parent that came later waits"
    index.add_many(CHAINS[2], np.arange(6), 0)
    assert sorted(index) == sorted(CHAINS[2])
