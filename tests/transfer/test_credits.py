"""A delivery into a layer window writes no layer before its engine's credits allow it."""

from __future__ import annotations

import ctypes
import time

import pytest

from tests.transfer.agent.jobs.test_transfer_queue import World
from transfer.agent.jobs.transfer import DeadlinePassed, JobCancelled
from transfer.credits import WORDS, CreditBoard, credit_word


@pytest.fixture
def credit():
    return CreditBoard(lambda address, length: None).take()[0]


@pytest.fixture(params=[1, 2])
def world(request):
    made = World(threads=request.param)
    yield made
    made.step(1000)
    made.queue.close(5)


def allow(credit, until: int) -> None:
    """As the engine does, one-sidedly."""
    ctypes.c_uint64.from_address(credit.address).value = until


def test_layers_follow_the_credits(world, credit):
    allow(credit, 7)
    world.submit(credit=credit, first_position=6)
    assert world.moved() == ("p0", 1, 0)
    time.sleep(0.02)
    assert world.peer.transfers.empty()
    allow(credit, 9)
    assert [world.moved() for _ in range(2)] == [("p0", 1, 1), ("p0", 1, 2)]
    assert world.end() == (1, None)


def test_a_blocked_job_lets_the_others_go_first(world, credit):
    world.submit("p0", plan=1, urgent=True, credit=credit, first_position=0)
    world.submit("p0", plan=2)
    assert world.end() == (2, None)
    allow(credit, 3)
    assert world.end() == (1, None)


def test_many_blocked_jobs_go_on_with_one_credit(world, credit):
    for position in (0, 0, 3, 3):
        world.submit("p0", credit=credit, first_position=position)
    allow(credit, 3)
    assert {world.end()[0] for _ in range(2)} == {1, 2}
    allow(credit, 6)
    assert {world.end()[0] for _ in range(2)} == {3, 4}


def test_a_blocked_job_can_be_cancelled(world, credit):
    job = world.submit("p0", credit=credit, first_position=0)
    time.sleep(0.01)
    world.queue.cancel(job)
    assert isinstance(world.end()[1], JobCancelled)
    assert world.peer.transfers.empty() and len(world.queue) == 0


def test_a_blocked_job_ends_at_its_deadline(world, credit):
    world.submit("p0", credit=credit, first_position=0, deadline_s=0.03)
    time.sleep(0.05)
    world.queue.expire()
    assert isinstance(world.end()[1], DeadlinePassed)


def test_a_new_incarnation_of_an_engine_has_no_credit_of_the_old_one():
    board = CreditBoard(lambda address, length: None)
    (old,) = board.take()
    allow(old, 100)
    (new,) = board.take()
    assert not new.allows(0)
    allow(old, 200)  # a write of the dead engine that lands late
    assert not new.allows(0)


def test_the_words_of_an_engines_ranks_are_neighbours():
    board = CreditBoard(lambda address, length: None)
    seen = set()
    for _ in range(WORDS):
        words = board.take(3)
        addresses = [word.address for word in words]
        assert addresses == [addresses[0], addresses[0] + 8, addresses[0] + 16]
        seen.update(addresses)
    assert max(seen) - min(seen) < 8 * WORDS
    allow(words[1], 5)
    assert [word.allows(4) for word in words] == [False, True, False]


def test_a_late_write_of_a_dead_incarnation_or_of_less_changes_nothing():
    (word,) = CreditBoard(lambda address, length: None).take(tag=7)
    allow(word, credit_word(6, 9))
    assert not word.allows(0)
    allow(word, credit_word(7, 5))
    assert word.allows(4) and not word.allows(5)
    for late in (credit_word(7, 2), credit_word(6, 9)):
        allow(word, late)
        assert word.allows(4) and not word.allows(5)
