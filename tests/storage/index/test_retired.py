"""Snapshots of conversations that go on and part, in less room than all of them would take."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from common.block import BlockKey
from storage.slot_pool import SLOT_ALIGNMENT_BYTES, SlotPool
from tests.examples import examples
from tests.storage.conftest import key_of

TURNS = st.lists(st.tuples(st.integers(0, 1000), st.booleans()), max_size=60)


class Conversations:
    """A snapshot a turn. The turn behind it uses it once, and then replaces those of its path."""

    def __init__(self, slots: int) -> None:
        self.pool = SlotPool(memoryview(bytearray(slots * SLOT_ALIGNMENT_BYTES)), 1)
        self.path_to: dict[BlockKey, list[BlockKey]] = {}
        self.followers: Counter[BlockKey] = Counter()
        self.branches: set[BlockKey] = set()

    @property
    def held(self) -> set[BlockKey]:
        return {*self.pool.resident}

    @property
    def wanted(self) -> set[BlockKey]:
        """Ends of conversations, and where some part."""
        return {key for key in self.path_to if self.followers[key] != 1} | self.branches

    def take_turn(self, before: BlockKey | None, is_branch: bool = False) -> BlockKey:
        """``is_branch``: at its end another conversation goes on otherwise."""
        path = [*self.path_to[before], before] if before is not None else []
        key, index = key_of(len(self.path_to)), self.pool.resident
        if before is not None:
            index.touch([before])
            self.followers[before] += 1
        self.pool.begin_fill(key)
        self.pool.commit(key)
        if is_branch:
            index.touch([key])
            self.branches.add(key)
        else:
            index.touch([], path)
        self.path_to[key] = path
        return key


@examples(100)
@given(turns=TURNS, slots=st.integers(2, 12))
def test_ends_and_branches_stay_while_they_alone_have_room(
    turns: list[tuple[int, bool]], slots: int
) -> None:
    talks = Conversations(slots)
    unreplaced: set[BlockKey] = set()
    for choice, is_branch in turns:
        before = [None, *sorted(talks.held)][choice % (len(talks.held) + 1)]
        if len(talks.wanted | unreplaced | {before}) >= slots:
            continue
        key = talks.take_turn(before, is_branch)
        # What goes on behind a branch has not replaced anything yet.
        unreplaced = unreplaced | {before} if is_branch else unreplaced - {*talks.path_to[key]}
        assert talks.wanted <= talks.held


def test_a_long_conversation_takes_the_room_of_two_snapshots() -> None:
    talks = Conversations(slots=3)
    idle = talks.take_turn(None)
    last = talks.take_turn(None)
    for _ in range(50):
        last = talks.take_turn(last)
    assert {idle, last} <= talks.held


def test_what_is_released_by_the_plan_that_read_it_stays_retired() -> None:
    talks = Conversations(slots=3)
    first, other = talks.take_turn(None), talks.take_turn(None)
    talks.pool.pin(first, owner=7)
    last = talks.take_turn(first)
    talks.pool.unpin_all(7)
    assert talks.take_turn(None) in talks.held
    assert talks.held >= {other, last} and first not in talks.held
