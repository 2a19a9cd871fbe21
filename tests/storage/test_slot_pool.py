"""Slots are never shared, never lost, and never taken from who needs them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.block import BlockKey
from storage.slot_pool import NoSlot, SlotPool
from tests.examples import examples
from tests.storage.conftest import key_of

SLOTS = 4
KEYS = [key_of(i) for i in range(7)]
keys = st.sampled_from(KEYS)
owners = st.integers(-2, 3)


class SlotPoolMachine(RuleBasedStateMachine):
    """The pool beside a plain model of it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(memoryview(bytearray(SLOTS * 4096 + 100)), 1000)
        self.filling: set[BlockKey] = set()
        self.resident: list[BlockKey] = []  # least recently used first
        self.pins: dict[BlockKey, set[int]] = {}
        self.order: list[tuple[int, BlockKey]] = []  # of pinning

    def unpinned(self) -> list[BlockKey]:
        return [key for key in self.resident if not self.pins[key]]

    @rule(key=keys)
    def begin_fill(self, key) -> None:
        if key in self.pins:
            with pytest.raises(ValueError):
                self.pool.begin_fill(key)
        elif len(self.pins) == SLOTS and not self.unpinned():
            with pytest.raises(NoSlot):
                self.pool.begin_fill(key)
        else:
            victim = self.unpinned()[0] if len(self.pins) == SLOTS else None
            assert self.pool.begin_fill(key) == victim
            if victim is not None:
                self.resident.remove(victim)
                del self.pins[victim]
            self.filling.add(key)
            self.pins[key] = set()

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.filling)))
        self.pool.commit(key)
        self.filling.remove(key)
        self.resident.append(key)

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.filling)))
        self.pool.abandon(key)
        self.filling.remove(key)
        for owner in list(self.pins[key]):
            self._unpin(key, owner)
        del self.pins[key]

    @rule(key=keys, owner=owners)
    def pin(self, key, owner: int) -> None:
        if key not in self.pins:
            with pytest.raises(KeyError):
                self.pool.pin(key, owner)
        else:
            self.pool.pin(key, owner)
            self.pins[key].add(owner)
            if (owner, key) not in self.order:
                self.order.append((owner, key))

    def _unpin(self, key: BlockKey, owner: int) -> None:
        if owner in self.pins.get(key, ()):
            self.pins[key].remove(owner)
            self.order.remove((owner, key))

    @rule(key=keys, owner=owners)
    def unpin(self, key, owner: int) -> None:
        self.pool.unpin(key, owner)
        self._unpin(key, owner)

    @rule(owner=owners)
    def unpin_all(self, owner: int) -> None:
        self.pool.unpin_all(owner)
        for _, key in [pin for pin in reversed(self.order) if pin[0] == owner]:
            self._unpin(key, owner)
            if key in self.resident:  # it was in use until now
                self.resident.remove(key)
                self.resident.append(key)

    @invariant()
    def agrees(self) -> None:
        assert self.pool.available == SLOTS - len(self.pins) + len(self.unpinned())
        assert len(self.pool.resident) == len(self.resident)
        for key in KEYS:
            assert (key in self.pool.resident) == (key in self.resident)
            assert self.pool.is_evictable(key) == (key in self.unpinned())
            for owner in range(-2, 4):
                assert self.pool.is_pinned_by(key, owner) == (owner in self.pins.get(key, ()))

    @invariant()
    def slots_are_apart(self) -> None:
        held = list(self.pins)
        offsets = self.pool.offsets(held)
        assert offsets.dtype == np.int64 and len(set(offsets.tolist())) == len(held)
        assert all(offset % 4096 == 0 and 0 <= offset < SLOTS * 4096 for offset in offsets)
        assert [self.pool.offset(key) for key in held] == offsets.tolist()


TestSlotPool = SlotPoolMachine.TestCase
TestSlotPool.settings = examples(60, stateful_step_count=40)


def test_buffers_are_the_slots_memory() -> None:
    memory = bytearray(3 * 8192)
    pool = SlotPool(memoryview(memory), 5000)
    assert pool.slot_bytes == 8192 and pool.num_slots == 3
    for i in range(3):
        pool.begin_fill(KEYS[i])
        pool.buffer(KEYS[i])[:] = bytes([i + 1]) * 5000
    for i in range(3):
        start = pool.offset(KEYS[i])
        assert memory[start : start + 8192] == bytes([i + 1]) * 5000 + bytes(3192)


def test_memory_too_small_for_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="hold no block of 8192 bytes"):
        SlotPool(memoryview(bytearray(8000)), 5000)


def test_using_a_block_makes_it_young() -> None:
    pool = SlotPool(memoryview(bytearray(2 * 4096)), 4096)
    for key in KEYS[:2]:
        pool.begin_fill(key)
        pool.commit(key)
    pool.pin(KEYS[0], 1)
    pool.unpin_all(1)
    assert pool.begin_fill(KEYS[2]) == KEYS[1]
