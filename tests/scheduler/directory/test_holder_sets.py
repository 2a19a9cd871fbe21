"""Sets of holders: numbers that stand for them, and that can be handed out again."""

from __future__ import annotations

import numpy as np

from common.block import TierName
from scheduler.directory.holder_sets import NOBODY, Holders, HolderSets


def test_unused_sets_are_forgotten_and_numbers_stay_small():
    sets = HolderSets()
    ids = np.zeros(3, np.int32)
    for i in range(50):  # a block that wanders from agent to agent
        ids = sets.changed(ids, sets.local_bits(f"agent-{i - 1}"), False)
        ids = sets.changed(ids, sets.bit(f"agent-{i}", TierName.DRAM), True)
    assert len(sets) > 50
    ids = sets.keep(np.unique(ids))[ids]
    assert len(sets) == 2
    alive = frozenset({"agent-49"})
    assert sets.seen_by(int(ids[0]), alive) == Holders(dram=("agent-49",))
    assert sets.seen_by(NOBODY, alive) is None
    assert sets.seen_by(int(ids[0]), frozenset({"agent-1"})) is None


def test_each_block_of_a_batch_keeps_its_own_set():
    sets = HolderSets()
    ids = np.zeros(4, np.int32)
    ids[1:3] = sets.changed(ids[1:3], sets.bit("a", TierName.SSD), True)
    ids = sets.changed(ids, sets.bit("b", TierName.REMOTE), True)
    alive = frozenset("a")
    assert [sets.seen_by(n, alive) for n in ids.tolist()] == [
        Holders(remote=True),
        Holders(ssd=("a",), remote=True),
        Holders(ssd=("a",), remote=True),
        Holders(remote=True),
    ]
    assert set(sets.without(sets.local_bits("a"))[ids].tolist()) == {ids[0]}
