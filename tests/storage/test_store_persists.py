"""What engines give is taken once, kept durably, and never stands in a reader's way."""

from __future__ import annotations

import msgspec
import pytest

from common.block import UNLABELLED
from common.ids import PlanId
from storage.index.owners import Selector
from tests.storage.conftest import key_of, payload_of
from tests.storage.store_bench import DRAM, NBYTES, REMOTE, SSD, A, B, Bench, C, D, E, F


def test_a_block_read_from_remote_is_local_from_then_on() -> None:
    bench = Bench(slots=1)
    bench.on_remote(A)
    bench.admit(1, [A])
    bench.store.release(PlanId(1))
    bench.poll()
    assert (A, SSD, True) in bench.changes
    bench.on_ssd(B)
    bench.admit(2, [B])
    bench.store.release(PlanId(2))
    bench.admit(3, [A])
    assert bench.settled[3].read_bytes == {SSD: NBYTES}
    assert (A, DRAM, False) in bench.changes, "evicted for plan 2"


def test_a_new_block_is_volatile_then_durable() -> None:
    bench = Bench()
    bench.ssd.stalled = bench.remote.stalled = True
    bench.persist(A)
    bench.poll()
    assert bench.changes == [(A, DRAM, True)]
    stats = bench.store.stats()
    assert (stats.volatile_blocks, stats.durable_blocks) == (1, 0)
    assert stats.slots_available == 3 and stats.persisting_blocks == 1
    bench.ssd.stalled = bench.remote.stalled = False
    bench.poll()
    assert set(bench.changes[1:]) == {(A, SSD, True), (A, REMOTE, True)}
    stats = bench.store.stats()
    assert (stats.volatile_blocks, stats.durable_blocks) == (0, 1)
    assert stats.slots_available == 4 and stats.persisting_blocks == 0
    assert {(e.key, e.tier) for e in bench.store.holdings()} == {
        (A, t) for t in (DRAM, SSD, REMOTE)
    }


def test_each_block_is_taken_from_engines_once() -> None:
    bench = Bench()
    bench.on_ssd(A)
    assert bench.store.reserve([A, B, B]).keys() == {B}
    assert bench.store.reserve([A, B]) == {}
    bench.store.abandon(B)
    assert bench.store.reserve([B]).keys() == {B}
    bench.store.commit(B)
    assert bench.store.reserve([B]) == {}
    assert bench.store.stats().skipped_persists_total == 0
    with pytest.raises(KeyError):
        bench.store.commit(B)


def test_a_plan_joins_a_block_that_is_being_pulled() -> None:
    bench = Bench()
    bench.store.reserve([A, B])
    bench.admit(1, [A, B])
    assert not bench.settled
    bench.memory[bench.pool.offset(A) :][:NBYTES] = payload_of(A, NBYTES)
    bench.store.commit(A)
    bench.store.abandon(B)
    bench.poll()
    assert bench.settled[1].in_dram == [True, False]


def test_persisting_never_waits_for_a_slot_or_a_slow_tier() -> None:
    bench = Bench(slots=3, write_queue_blocks=1)
    bench.on_ssd(A, B)
    bench.admit(1, [A, B])
    assert bench.store.reserve([C, D]).keys() == {C}
    assert bench.store.stats().skipped_persists_total == 1
    bench.store.abandon(C)
    bench.store.release(PlanId(1))
    bench.ssd.stalled = bench.remote.stalled = True
    bench.persist(C, D)
    assert bench.store.stats().skipped_persists_total == 2, "D is in DRAM, and not written"
    assert bench.store.is_resident([C, D]) == [True, True]
    bench.ssd.stalled = bench.remote.stalled = False
    bench.poll()
    assert sorted(bench.ssd_memory.keys()) == sorted([A, B, C])


def test_persisting_leaves_a_waiting_plan_its_slots() -> None:
    bench = Bench(slots=4)
    bench.on_ssd(A, B, C, D, E)
    bench.admit(1, [A, B])
    bench.admit(2, [C, D, E])
    assert bench.store.stats().waiting_plans == 1 and bench.store.stats().slots_available == 2
    assert bench.store.reserve([F, key_of(6)]).keys() == {F}, "3 of 4 slots are spoken for"
    bench.store.release(PlanId(1))
    bench.poll()
    assert bench.settled[2].in_dram == [True] * 3


def test_failed_writes_are_counted_and_let_go() -> None:
    bench = Bench()
    bench.ssd.unwritable = {A}
    bench.remote.write_failure_rate = 1.0
    bench.persist(A)
    bench.poll()
    stats = bench.store.stats()
    assert stats.failed_persists_total == 2 and stats.volatile_blocks == 1
    assert stats.slots_available == 4


def test_losses_of_the_tiers_are_announced() -> None:
    bench = Bench(ssd_blocks=2)
    bench.persist(A)
    bench.poll()
    bench.persist(B)
    bench.poll()
    bench.persist(C)
    bench.poll()
    assert bench.changes.count((A, SSD, False)) == 1
    held = {(e.key, e.tier) for e in bench.store.holdings() if e.tier is SSD}
    assert held == {(B, SSD), (C, SSD)}


def test_what_is_used_in_dram_stays_on_ssd_and_a_prefix_from_its_beginning() -> None:
    bench = Bench(slots=8, ssd_blocks=4, remote=False)
    for key in (A, B, C, D):
        bench.persist(key)
        bench.poll()
    bench.admit(1, [A, B, C])
    assert bench.settled[1].read_bytes == {}, "all from DRAM"
    bench.store.release(PlanId(1))
    for key, held in ((E, [A, B, C, E]), (F, [A, B, E, F])):
        bench.persist(key)
        bench.poll()
        assert sorted(bench.ssd_memory.keys()) == sorted(held)


def test_with_reused_a_block_goes_to_remote_when_it_is_used_again() -> None:
    bench = Bench(write_policy="reused")
    bench.persist(A, B)
    bench.poll()
    assert sorted(bench.ssd_memory.keys()) == sorted([A, B]) and not bench.remote_memory.blocks
    bench.admit(1, [A])
    bench.poll()
    assert set(bench.remote_memory.blocks) == {A}


@pytest.mark.parametrize(
    ("policy", "first", "second"), [("always", 1, 1), ("reused", 0, 1), ("never", 0, 0)]
)
def test_a_block_from_remote_is_promoted_by_policy(policy: str, first: int, second: int) -> None:
    bench = Bench(slots=1, promotion_policy=policy)
    bench.on_remote(A)
    for plan, kept in ((1, first), (2, second)):
        bench.admit(plan, [A])
        bench.store.release(PlanId(plan))
        bench.poll()
        assert len(bench.ssd_memory.keys()) == kept
        bench.on_ssd(B)
        bench.admit(plan + 10, [B])  # A leaves DRAM
        bench.store.release(PlanId(plan + 10))
        bench.poll()
        bench.ssd_memory.drop(Selector.parse("namespace:*"))
        bench.poll()


def test_an_unknown_policy_names_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="everywhere, reused"):
        Bench(write_policy="sometimes")
    with pytest.raises(ValueError, match="always, reused, never"):
        Bench(promotion_policy="sometimes")


def test_a_drop_may_leave_what_is_shared() -> None:
    bench = Bench()
    label = msgspec.structs.replace(UNLABELLED, weight_version="v1")
    for key in bench.store.reserve([A]):
        bench.store.commit(key, label)
    bench.poll()
    assert set(bench.ssd_memory.blocks) == {A}
    bench.store.drop(Selector.parse("version:v1"), shared=False)
    bench.poll()
    assert [(e.key, e.tier) for e in bench.store.holdings()] == [(A, REMOTE)]
    assert set(bench.remote_memory.blocks) == {A} and not bench.ssd_memory.blocks


def test_a_drop_empties_every_tier_but_not_what_a_plan_uses() -> None:
    bench = Bench()
    label = msgspec.structs.replace(UNLABELLED, weight_version="v1")
    bench.persist(E)
    for key in bench.store.reserve([A, B]):
        bench.store.commit(key, label)
    bench.poll()
    bench.admit(1, [A])
    bench.store.drop(Selector.parse("version:v1"))
    bench.poll()
    assert {(e.key, e.tier) for e in bench.store.holdings()} == {
        (A, DRAM),
        *((E, tier) for tier in (DRAM, SSD, REMOTE)),
    }
    assert set(bench.remote_memory.blocks) == set(bench.ssd_memory.blocks) == {E}
