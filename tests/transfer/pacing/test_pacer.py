"""The pacer: its rate, who goes first, what it leaves to others, and its floor."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.examples import examples
from tests.transfer.agent.jobs.test_transfer_queue import LAYOUT, World
from transfer.pacing.pacer import (
    BATCH_BYTES_MIN,
    BURST_S,
    HEADROOM,
    IN_TIME,
    SAMPLE_S,
    SHARE_MIN,
    WIRE_BYTES_PER_BYTE,
    FixedRate,
    Pacer,
    Precedence,
    SpareRate,
    TokenBucket,
)

RATES = st.floats(1e3, 1e9)


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


# ---- the bucket -------------------------------------------------------------------------


@examples(100)
@given(RATES, st.lists(st.tuples(st.floats(0, 0.1), st.floats(0.01, 3)), max_size=60))
def test_no_span_has_more_than_the_rate_a_burst_and_one_batch(rate, steps):
    """Whatever the pauses and batch sizes (in bursts) are, if everyone waits as told."""
    bucket, now, taken = TokenBucket(0.0), 0.0, []
    bucket.set_rate(now, rate)
    for pause_s, bursts in steps:
        now += pause_s + bucket.ready_in_s(now + pause_s)
        nbytes = int(bursts * rate * BURST_S)
        bucket.take(now, nbytes)
        taken.append((now, nbytes))
    largest = max((nbytes for _, nbytes in taken), default=0)
    for i, (begin, _) in enumerate(taken):
        total = 0
        for end, nbytes in taken[i:]:
            total += nbytes
            assert total <= rate * (end - begin + BURST_S) * (1 + 1e-6) + largest + 1


@examples(50)
@given(RATES, st.lists(st.floats(0.1, 3), min_size=50, max_size=50))
def test_who_always_has_something_to_send_gets_the_whole_rate(rate, bursts):
    bucket, now, total = TokenBucket(0.0), 0.0, 0
    bucket.set_rate(now, rate)
    for size in bursts:
        now += bucket.ready_in_s(now)
        nbytes = round(size * rate * BURST_S)
        bucket.take(now, nbytes)
        total += nbytes
    now += bucket.ready_in_s(now)
    assert total == pytest.approx(rate * now, rel=0.02)


def test_nothing_goes_at_rate_zero():
    bucket = TokenBucket(0.0)
    assert bucket.ready_in_s(1000.0) == float("inf")


# ---- what others leave ------------------------------------------------------------------


@examples(50)
@given(st.floats(0, 1.2), st.floats(1e6, 1e10))
def test_the_rate_is_what_steady_others_leave(others_share, nic):
    """Others that want more than the NIC has are given all but the least share."""
    sent = 0.0
    spare = SpareRate(nic, lambda: int(sent))
    now, own = 0.0, 0
    rate = spare.rate(now, own)
    for _ in range(200):
        now += SAMPLE_S
        own += int(rate * SAMPLE_S)
        own_wire = rate * WIRE_BYTES_PER_BYTE
        sent += (min(others_share * nic, nic - own_wire) + own_wire) * SAMPLE_S
        rate = spare.rate(now, own)
    wanted = max(SHARE_MIN, 1 - HEADROOM - others_share)
    assert rate * WIRE_BYTES_PER_BYTE == pytest.approx(wanted * nic, abs=0.001 * nic)


def test_others_count_with_their_last_peak_until_it_is_long_past():
    sent = 0
    spare = SpareRate(1000.0, lambda: sent)
    rates = [spare.rate(0.0, 0)]
    sent += 60
    rates += [spare.rate(0.1 * n, 0) for n in (*range(1, 11), 12)]
    assert np.array(rates) * WIRE_BYTES_PER_BYTE == pytest.approx([900] + 10 * [300] + [900])


# ---- the pacer --------------------------------------------------------------------------


def simulate(pacer, clock, jobs, batch_bytes):
    """Each job always has a batch to send until its bytes are gone; one thread a job.
    ``jobs``: precedence -> bytes. Returns precedence -> when its last batch went."""
    left, ends = dict(jobs), {}
    turns = {precedence: pacer.join(precedence) for precedence in jobs}
    while turns:
        pauses = {precedence: pacer.pause_s(turn) for precedence, turn in turns.items()}
        ready = [precedence for precedence, pause_s in pauses.items() if pause_s == 0]
        if not ready:
            clock.now += max(1e-6, min(pauses.values()))
            continue
        (precedence,) = ready
        nbytes = min(batch_bytes, left[precedence])
        pacer.spend(nbytes)
        pacer.leave(turns.pop(precedence))
        left[precedence] -= nbytes
        if left[precedence]:
            turns[precedence] = pacer.join(precedence)
        else:
            ends[precedence] = clock.now
    return ends


PRECEDENCES = st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 20))


@examples(40)
@given(st.dictionaries(PRECEDENCES, st.integers(1, 400_000), min_size=1, max_size=5))
def test_jobs_end_in_their_order_and_none_waits_for_a_later_one(jobs):
    clock, rate, batch = Clock(), 1e6, 4096
    pacer = Pacer(FixedRate(rate), clock=clock)
    began, before = clock.now, 0
    with pacer._changed:
        ends = simulate(pacer, clock, jobs, batch)
    for precedence in sorted(jobs):
        assert ends[precedence] - began <= before / rate + jobs[precedence] / rate + 0.001
        before += jobs[precedence]
    assert sorted(ends, key=ends.__getitem__) == sorted(jobs)
    assert pacer.stats().bytes_total == sum(jobs.values())


@examples(30)
@given(st.floats(1e3, 1e6), st.floats(1e3, 1e6))
def test_the_rate_is_never_below_the_floor(cap, floor):
    clock = Clock()
    pacer = Pacer(FixedRate(cap), lambda now: floor, clock)
    nbytes = int(max(cap, floor))
    with pacer._changed:
        ends = simulate(pacer, clock, {(False, 1, 1): nbytes}, 1000)
    assert ends[False, 1, 1] - 50 <= nbytes / max(cap, floor) + 0.01
    stats = pacer.stats()
    assert stats.rate == max(cap, floor)
    assert bool(stats.floor_hits_total) == (floor > cap)


def test_threads_share_the_rate_and_a_job_that_is_given_up_stops_waiting():
    pacer = Pacer(FixedRate(2e6))
    began = time.monotonic()

    def move(number: int) -> None:
        for _ in range(10):
            pacer.wait(Precedence(False, number, number), lambda: None, 10_000)

    threads = [threading.Thread(target=move, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert 0.19 <= time.monotonic() - began < 2

    def gone() -> None:
        raise TimeoutError

    pacer.spend(100_000_000)
    with pytest.raises(TimeoutError):
        pacer.wait(Precedence(False, 1, 1), gone, 10_000)
    assert pacer.stats().waiting == 0


# ---- in the agent's queue ---------------------------------------------------------------


@pytest.fixture
def world():
    pacer = Pacer(FixedRate(BATCH_BYTES_MIN * 1000.0))
    made: Any = World(pacer=pacer)
    made.pacer = pacer
    yield made
    made.step(1000)
    made.queue.close(5)


def test_what_crosses_a_link_is_paced_and_what_stays_or_is_read_is_not(world):
    for fields in ({}, {"session": "own"}, {"is_read": True}):
        world.submit(**fields)
        assert world.end()[1] is None
    # FakePeer runs the hook twice a layer.
    assert world.pacer.stats().bytes_total == 2 * LAYOUT.block_bytes


def test_the_floor_is_what_the_oldest_plan_and_those_before_it_need_in_time(world):
    world.hold()
    world.submit(plan=5, urgent=True, deadline_s=100)
    world.moved()
    assert needed(world) == pytest.approx(LAYOUT.block_bytes / (100 * IN_TIME), rel=0.01)
    oldest = world.submit(plan=3, deadline_s=10)
    world.submit(plan=9, deadline_s=1)
    world.submit(plan=2, session="own", deadline_s=1)
    assert needed(world) == pytest.approx(2 * LAYOUT.block_bytes / (10 * IN_TIME), rel=0.01)
    world.queue.cancel(oldest)
    assert needed(world) < LAYOUT.block_bytes / (10 * IN_TIME)


def needed(world) -> float:
    return world.queue.needed_rate(time.monotonic(), lambda session: session != "own")


def test_a_job_whose_turn_does_not_come_ends_at_its_deadline():
    world = World(pacer=Pacer(FixedRate(0.0)))
    began = time.monotonic()
    world.submit(deadline_s=0.2)
    assert "deadline" in str(world.end()[1])
    assert time.monotonic() - began < 5
    world.queue.close(5)
