"""The store over real tiers: what engines gave comes back after restarts and losses."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.block import BlockKey, TierName
from common.ids import PlanId
from common.messages.from_agents import Holding
from storage.block_format import HEADER_BYTES
from storage.remote.tier import RemoteTier
from storage.slot_pool import SlotPool
from storage.ssd.tier import SsdTier
from storage.store_events import ShareSettled, StoreEvent
from storage.tiered_store import TieredStore
from tests.storage.conftest import QUICK, key_of, payload_of
from tests.storage.remote import pack_files
from tests.storage.ssd.slab_files import flip, place_of, slow_down, stored

NBYTES, SLOTS = 20_000, 8
KEYS = [key_of(i) for i in range(24)]


class Node:
    """One process's store, with a loop that sleeps until a tier wakes it."""

    def __init__(self, root: Path) -> None:
        self._wake = threading.Event()
        self.memory = bytearray(SLOTS * 20480)
        self.store = TieredStore(
            SlotPool(memoryview(self.memory), NBYTES),
            SsdTier(root / "ssd", 1 << 30, self._wake.set, threads=4),
            RemoteTier(f"file://{root}/remote", {}, self._wake.set, QUICK),
        )

    def run_until(self, events: int, kind: type[StoreEvent]) -> list[StoreEvent]:
        seen: list[StoreEvent] = []
        end = time.monotonic() + 20
        while len(seen) < events:
            assert time.monotonic() < end, f"{len(seen)} of {events} events"
            self._wake.clear()
            seen += [e for e in self.store.poll(time.monotonic()) if isinstance(e, kind)]
            if len(seen) < events:
                self._wake.wait(0.2)
        return seen

    def persist(self, keys: Sequence[BlockKey]) -> None:
        for key, offset in self.store.reserve(keys).items():
            self.memory[offset : offset + NBYTES] = payload_of(key, NBYTES)
            self.store.commit(key)

    def read(self, plan: int, keys: Sequence[BlockKey]) -> ShareSettled:
        """A plan's whole life; the bytes are compared while it pins them."""
        self.store.admit(PlanId(plan), list(keys), time.monotonic() + 15, time.monotonic())
        (event,) = self.run_until(1, ShareSettled)
        assert isinstance(event, ShareSettled) and event.plan == plan
        for key, in_dram in zip(keys, event.in_dram, strict=True):
            if in_dram:
                offset = self.store.pool.offset(key)
                assert self.memory[offset : offset + NBYTES] == payload_of(key, NBYTES)
        self.store.release(PlanId(plan))
        return event


def _fill(root: Path) -> None:
    node = Node(root)
    for start in range(0, len(KEYS), 6):
        node.persist(KEYS[start : start + 6])
        while node.store.stats().persisting_blocks:
            node.run_until(1, Holding)
    assert node.store.stats().durable_blocks == len(KEYS)
    node.store.close()


def test_blocks_come_from_ssd_then_remote_then_ssd_again(tmp_path: Path) -> None:
    _fill(tmp_path)
    node = Node(tmp_path)
    for plan in range(4):
        event = node.read(plan, KEYS[plan * 6 : plan * 6 + 6])
        assert event.in_dram == [True] * 6
        assert event.read_bytes == {TierName.SSD: 6 * NBYTES}
    node.store.close()
    shutil.rmtree(tmp_path / "ssd")
    node = Node(tmp_path)
    assert node.read(1, KEYS[:6]).read_bytes == {TierName.REMOTE: 6 * NBYTES}
    while node.store.stats().persisting_blocks:
        node.run_until(1, Holding)
    assert node.read(2, KEYS[6:14]).read_bytes == {TierName.REMOTE: 8 * NBYTES}
    assert node.read(3, KEYS[:6]).read_bytes == {TierName.SSD: 6 * NBYTES}
    node.store.close()


def test_a_slow_ssd_costs_deadlines_while_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(tmp_path)
    shutil.rmtree(tmp_path / "ssd")
    node = Node(tmp_path)
    node.read(1, KEYS[:3])
    while node.store.stats().persisting_blocks:
        node.run_until(1, Holding)
    node.store.close()
    node = Node(tmp_path)  # with three blocks on SSD
    with monkeypatch.context() as patched:
        gate = slow_down(patched, tmp_path / "ssd")
        start = time.monotonic()
        node.store.admit(PlanId(1), KEYS[:3], start + 2, start)
        assert node.read(2, KEYS[6:9]).read_bytes == {TierName.REMOTE: 3 * NBYTES}
        (late,) = node.run_until(1, ShareSettled)
        assert isinstance(late, ShareSettled) and late.plan == 1
        assert late.in_dram == [False] * 3 and 1.9 < time.monotonic() - start < 8
        node.store.release(PlanId(1))
        gate.set()
    assert node.read(3, KEYS[:3]).in_dram == [True] * 3
    node.store.close()


def test_damage_on_ssd_is_healed_from_remote(tmp_path: Path) -> None:
    _fill(tmp_path)
    for _, place in stored(tmp_path / "ssd"):
        flip(place.path, place.offset + HEADER_BYTES + NBYTES - 5)
    node = Node(tmp_path)
    event = node.read(1, KEYS[:6])
    assert event.in_dram == [True] * 6 and event.read_bytes == {TierName.REMOTE: 6 * NBYTES}
    assert node.store.stats().tiers[TierName.SSD].io.corrupt_blocks_total == 6
    while node.store.stats().persisting_blocks:
        node.run_until(1, Holding)
    node.read(2, KEYS[6:14])
    assert node.read(3, KEYS[:6]).read_bytes == {TierName.SSD: 6 * NBYTES}
    node.store.close()


def test_damage_everywhere_is_a_miss_of_that_block_alone(tmp_path: Path) -> None:
    _fill(tmp_path)
    place = place_of(tmp_path / "ssd", KEYS[2])
    flip(place.path, place.offset + HEADER_BYTES + NBYTES - 5)
    pack_files.flip(pack_files.places_in(tmp_path / "remote")[KEYS[2]][0], -5)
    node = Node(tmp_path)
    assert node.read(1, KEYS[:6]).in_dram == [True, True, False, True, True, True]
    assert node.store.stats().unavailable_blocks_total == 1
    node.persist([KEYS[2]])
    while node.store.stats().persisting_blocks:
        node.run_until(1, Holding)
    node.store.close()
    node = Node(tmp_path)
    assert node.read(1, KEYS[:6]).in_dram == [True] * 6
    node.store.close()
