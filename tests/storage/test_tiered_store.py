"""What plans and operators rely on: read once, pinned, the oldest plan first."""

from __future__ import annotations

import pytest

from common.ids import PlanId
from common.messages.from_agents import Holding
from storage.slot_pool import SlotPool
from storage.store_events import ShareSettled
from storage.tiered_store import TieredStore
from storage.tiers.contract import BlockIO
from storage.tiers.memory_tier import MemoryTier
from tests.storage.conftest import no_wake, payload_of
from tests.storage.store_bench import DRAM, KEYS, NBYTES, REMOTE, SSD, A, B, Bench, C, D, E, F


def test_a_share_is_read_from_the_nearest_tier_and_pinned() -> None:
    bench = Bench(slots=4)
    bench.on_ssd(A)
    bench.on_remote(A, B)
    bench.admit(1, [A, B, C])
    event = bench.settled[1]
    assert event.in_dram == [True, True, False]
    assert event.read_bytes == {SSD: NBYTES, REMOTE: NBYTES}
    bench.check_bytes(A)
    bench.check_bytes(B)
    stats = bench.store.stats()
    assert stats.hits_total == {DRAM: 0, SSD: 1, REMOTE: 1}
    assert stats.unavailable_blocks_total == 1 and stats.pinning_plans == 1
    assert stats.slots_available == 2 and not any(stats.read_queue_bytes.values())
    bench.store.release(PlanId(1))
    assert bench.store.stats().slots_available == 4


def test_a_resident_block_is_never_read() -> None:
    bench = Bench()
    bench.on_ssd(A, B)
    bench.admit(1, [A, B])
    bench.admit(2, [B, A])
    assert bench.settled[2].in_dram == [True, True] and bench.settled[2].read_bytes == {}
    assert bench.ssd_memory.stats().io.read_bytes_total == 2 * NBYTES
    bench.store.release(PlanId(1))
    bench.store.release(PlanId(2))
    bench.admit(3, [A])
    assert bench.ssd_memory.stats().io.read_bytes_total == 2 * NBYTES


def test_plans_share_a_read_in_flight() -> None:
    bench = Bench()
    bench.on_ssd(A, B, C)
    bench.ssd.stalled = True
    bench.admit(1, [A, B])
    bench.admit(2, [B, C])
    assert not bench.settled
    bench.store.release(PlanId(1))
    bench.ssd.stalled = False
    bench.poll()
    assert bench.settled.keys() == {2}
    assert bench.settled[2].read_bytes == {SSD: 2 * NBYTES}, "the first that still waited"
    assert bench.ssd_memory.stats().io.read_bytes_total == 3 * NBYTES
    assert bench.store.is_resident([A, B, C]) == [True] * 3
    assert bench.store.stats().slots_available == 2, "the released plan's block is evictable"


@pytest.mark.parametrize("order", [(2, 3), (3, 2)])
def test_slots_are_given_to_the_oldest_plan_first_and_all_at_once(order: tuple[int, int]) -> None:
    bench = Bench(slots=4)
    bench.on_ssd(*KEYS)
    bench.admit(1, [A, B, C])
    wanted = {2: [D, E], 3: [E, F]}
    for plan in order:
        bench.admit(plan, wanted[plan])
    assert bench.settled.keys() == {1}, "one slot is free, but plan 2 comes first"
    assert bench.store.stats().waiting_plans == 2
    bench.poll(2.0)
    bench.store.release(PlanId(1))
    bench.poll()
    assert bench.settled[2].in_dram == [True, True] and bench.settled[2].queue_s == 2.0
    assert bench.settled[3].in_dram == [True, True]
    assert bench.settled[2].read_bytes == {SSD: 2 * NBYTES}, "it was granted first"
    assert not any(bench.store.stats().read_queue_bytes.values())


def test_a_share_larger_than_dram_is_cut_to_its_beginning() -> None:
    bench = Bench(slots=3)
    bench.on_ssd(*KEYS)
    bench.admit(1, KEYS)
    assert bench.settled[1].in_dram == [True, True, True, False, False, False]
    bench.admit(2, KEYS)
    assert 2 in bench.settled, "all it can have is here"


def test_a_plan_waiting_for_slots_can_be_cancelled() -> None:
    bench = Bench(slots=2)
    bench.on_ssd(*KEYS)
    bench.admit(1, [A, B])
    bench.admit(2, [C, D])
    bench.admit(3, [A])
    bench.store.release(PlanId(2))
    bench.poll()
    assert bench.settled.keys() == {1, 3}
    bench.store.release(PlanId(77))


def test_slots_of_a_cancelled_read_stay_until_it_has_ended() -> None:
    bench = Bench(slots=2)
    bench.on_ssd(A, B, C, D)
    bench.ssd.stalled = True
    bench.admit(1, [A, B])
    bench.store.release(PlanId(1))
    bench.admit(2, [C, D])
    assert bench.store.stats().slots_available == 0 and bench.store.stats().waiting_plans == 1
    bench.ssd.stalled = False
    bench.poll()
    assert bench.settled.keys() == {2}
    bench.check_bytes(C)


def test_a_deadline_settles_with_what_is_there() -> None:
    bench = Bench()
    bench.on_ssd(A)
    bench.on_remote(B)
    bench.remote.stalled = True
    bench.admit(1, [A, B], timeout_s=5)
    bench.poll(4.9)
    assert not bench.settled
    bench.poll(0.2)
    assert bench.settled[1].in_dram == [True, False]
    assert bench.settled[1].read_s == pytest.approx(5.1)
    assert bench.store.stats().expired_plans_total == 1
    bench.remote.stalled = False
    bench.poll()
    assert bench.store.is_resident([B]) == [True], "the late block is kept, unpinned"
    assert bench.store.stats().slots_available == 3


def test_a_deadline_in_the_queue_settles_with_what_is_resident() -> None:
    bench = Bench(slots=2)
    bench.on_ssd(A, B, C)
    bench.admit(1, [A, B])
    bench.admit(2, [A, C], timeout_s=1)
    bench.poll(1.0)
    assert bench.settled[2].in_dram == [True, False]
    bench.store.release(PlanId(1))
    assert bench.store.stats().slots_available == 1, "plan 2 pins A"


def test_a_smaller_plan_goes_on_when_the_one_before_it_expires() -> None:
    bench = Bench(slots=3)
    bench.on_ssd(*KEYS)
    bench.admit(1, [A, B])
    bench.admit(2, [C, D], timeout_s=1)
    bench.admit(3, [E])
    bench.poll(1.0)
    assert bench.settled[2].in_dram == [False, False] and bench.settled[3].in_dram == [True]


def test_a_forgotten_plan_cannot_pin_for_ever() -> None:
    bench = Bench(slots=2, hold_s=60)
    bench.on_ssd(A, B, C)
    bench.admit(1, [A, B])
    bench.admit(2, [C], timeout_s=1000)
    bench.poll(59)
    assert 2 not in bench.settled
    bench.poll(2)
    assert bench.settled[2].in_dram == [True]
    assert bench.store.stats().forgotten_plans_total == 1


def test_an_unreadable_ssd_block_comes_from_remote_or_not_at_all() -> None:
    bench = Bench()
    bench.on_ssd(A, B)
    bench.on_remote(A)
    bench.ssd.unreadable = {A, B}
    bench.admit(1, [A, B])
    assert bench.settled[1].in_dram == [True, False]
    assert bench.settled[1].read_bytes == {REMOTE: NBYTES}
    bench.check_bytes(A)
    assert bench.store.stats().slots_available == 3, "the failed block's slot is free"
    without_remote = Bench(remote=False)
    without_remote.on_ssd(A)
    without_remote.ssd.unreadable = {A}
    without_remote.admit(1, [A, B])
    assert without_remote.settled[1].in_dram == [False, False]
    assert without_remote.store.stats().pinning_plans == 0


def test_full_queue_and_known_plans_are_refused() -> None:
    bench = Bench(slots=1, plans_max=1)
    bench.on_ssd(A, B, C)
    bench.admit(1, [A])
    bench.admit(2, [B])
    bench.admit(3, [C])
    assert bench.settled[3].in_dram == [False]
    bench.admit(1, [B])
    assert bench.store.stats().refused_plans_total == 2
    bench.store.release(PlanId(1))
    bench.poll()
    assert bench.settled[2].in_dram == [True]


def test_the_read_rate_is_measured_over_reading_time() -> None:
    bench = Bench(slots=6)
    bench.on_ssd(*KEYS)
    bench.ssd.delay_s_max = 1e-9
    for plan, key in enumerate(KEYS):
        bench.ssd.stalled = True
        bench.admit(plan, [key])
        bench.poll(0.5)
        bench.ssd.stalled = False
        bench.poll(0.5)
        bench.poll(10.0)
    rates = bench.store.stats().read_bytes_per_s
    assert rates == {SSD: pytest.approx(NBYTES / 1.0, rel=0.05), REMOTE: 0.0}


def test_what_is_not_kept_in_dram_leaves_it_with_its_last_user() -> None:
    bench = Bench(keep_in_dram=False)
    bench.on_ssd(A, B)
    bench.admit(1, [A, B])
    bench.admit(2, [B])
    assert bench.settled[2].in_dram == [True]
    bench.store.release(PlanId(1))
    bench.poll()
    assert bench.store.is_resident([A, B]) == [False, True]
    bench.store.release(PlanId(2))
    bench.poll()
    assert bench.store.is_resident([B]) == [False] and (B, DRAM, False) in bench.changes
    bench.persist(C)
    bench.poll()
    assert bench.store.is_resident([C]) == [False] and bench.store.stats().volatile_blocks == 0
    bench.admit(3, [A])
    assert bench.settled[3].read_bytes == {SSD: NBYTES}, "read anew"


def test_what_is_on_ssd_at_start_is_held() -> None:
    ssd = MemoryTier(SSD, no_wake)
    ssd.submit_writes([BlockIO(A, memoryview(payload_of(A, NBYTES)))])
    ssd.poll()
    ssd.take_changes()
    store = TieredStore(SlotPool(memoryview(bytearray(8192)), NBYTES), ssd, None)
    assert store.holdings() == [Holding(A, SSD, True)]
    assert store.poll(0.0) == [] and store.stats().durable_blocks == 1
    with pytest.raises(KeyError):
        store.pool.offset(A)
    store.close()


def test_dram_alone_serves_what_engines_gave() -> None:
    memory = bytearray(2 * 8192)
    store = TieredStore(SlotPool(memoryview(memory), NBYTES), None, None)
    store.reserve([A])
    store.commit(A)
    store.admit(PlanId(1), [A, B], 10.0, 0.0)
    (event,) = [e for e in store.poll(0.0) if isinstance(e, ShareSettled)]
    assert event.in_dram == [True, False]
    assert store.pool.offsets([A]).tolist() == [store.pool.offset(A)]
