"""Jobs, plans and the completion board: what an engine believes about transfers."""

import time
from typing import Any

import numpy as np
import pytest

from common.block import BlockKey, BlockLayout, Namespace
from common.board_word import FAILED, board_word
from common.ids import BoardSlot, Incarnation, JobId, PlanId
from common.messages.from_gateway import EnginePlan
from engine.plans import PLANS_MAX, Plans
from engine.transfers.completion_board import BoardFull, CompletionBoard
from engine.transfers.jobs import Jobs
from engine.transfers.page_holds import PageHolds
from engine.weights import Weights


class _Clock:
    now = 100.0

    def __call__(self):
        return self.now


class _Holds(PageHolds):
    def __init__(self):
        self.held = {}

    def hold(self, job, pages, of_parts=()):
        self.held[job] = list(pages)

    def release(self, job):
        self.held.pop(job)


@pytest.fixture
def jobs():
    holds, clock = _Holds(), _Clock()
    table: Any = Jobs(incarnation=Incarnation(1_700_000_000_000), holds=holds, clock=clock)
    table.test_holds, table.test_clock = holds, clock
    return table


def test_a_job_holds_its_pages_until_it_ends(jobs):
    reasons = []
    job = jobs.open("agent-d0", 5, [3, 4], 1.0, reasons.append)
    assert jobs.test_holds.held == {job: [3, 4]}
    jobs.close(job)
    jobs.close(job)
    assert jobs.test_holds.held == {} and reasons == [""]


def test_job_numbers_fit_the_board_and_grow_over_restarts(jobs):
    first = jobs.open("a", 1, [], 1.0, lambda _: None)
    later = Jobs(Incarnation(1_700_000_000_001), _Holds()).open(
        "a", Incarnation(1), [], 1.0, lambda _: None
    )
    assert first < later < 1 << 48


def test_a_suspended_agent_keeps_its_pages_in_quarantine(jobs):
    job = jobs.open("a", 5, [1], 2.0, lambda _: None)
    jobs.test_clock.now += 1000
    assert jobs.stopped() == {}
    assert jobs.quarantined() == [job] and jobs.test_holds.held == {job: [1]}


def test_a_newer_incarnation_stops_the_jobs_of_the_old_one_which_hold_their_pages(jobs):
    reasons, failures = [], []
    job = jobs.open("a", 5, [1], 2.0, reasons.append, failures.append)
    jobs.open("b", 5, [2], 2.0, lambda _: None)
    jobs.agent_restarted("a", 6)
    jobs.test_clock.now += 1000
    assert jobs.stopped() == {"a": [job]} and "died" in failures[0]
    assert job in jobs.test_holds.held and not reasons
    jobs.over(job)
    assert job not in jobs.test_holds.held and reasons == failures


def test_a_job_that_fails_in_mid_write_is_in_quarantine_until_it_is_over(jobs):
    reasons, failures = [], []
    job = jobs.open("a", 5, [1, 2], 60.0, reasons.append, failures.append)
    jobs.stopped_writing(job, "write failed")
    jobs.stopped_writing(job, "again")
    assert failures == ["write failed"] and not reasons
    assert jobs.quarantined() == [job] and jobs.test_holds.held == {job: [1, 2]}
    jobs.over(job)
    assert (failures, reasons) == (["write failed"], ["write failed"])
    assert jobs.quarantined() == [] and jobs.stopped() == {}


def test_a_job_for_an_incarnation_that_just_ended_has_stopped(jobs):
    jobs.agent_restarted("a", 6)
    job = jobs.open("a", 5, [1], 2.0, lambda _: None)
    assert jobs.stopped() == {"a": [job]} and job in jobs.test_holds.held


def test_messages_of_an_earlier_incarnation_are_not_believed(jobs):
    job = jobs.open("a", 6, [1], 2.0, lambda _: None)
    assert jobs.of_incarnation(job, "a", 6)
    assert not jobs.of_incarnation(job, "a", 5)
    assert not jobs.of_incarnation(job, "b", 6)


def test_the_board_ignores_words_of_earlier_jobs():
    regions = []
    board = CompletionBoard(2, lambda address, length: regions.append((address, length)))
    assert regions == [(board.address(BoardSlot(0)), 16)]
    slot = board.take()
    _write(board, slot, board_word(JobId(7), 8))
    assert board.layers_delivered(slot, JobId(7)) == 8
    assert board.layers_delivered(slot, JobId(8)) == 0
    _write(board, slot, board_word(JobId(8), FAILED))
    assert board.layers_delivered(slot, JobId(8)) == FAILED


def _write(board, slot, word):
    # As an agent does: eight bytes at the address it was given.
    import ctypes

    ctypes.memmove(board.address(slot), np.uint64(word).tobytes(), 8)


def test_the_board_is_bounded():
    board = CompletionBoard(1, lambda address, length: None)
    slot = board.take()
    with pytest.raises(BoardFull):
        board.take()
    board.give_back(slot)
    assert board.take() == slot


def _plan(number, rid, deadline_s=10.0):
    return EnginePlan(
        PlanId(number), rid, b"n" * 32, [BlockKey(b"k" * 32)], ["agent-d0"], [0], deadline_s
    )


def test_plans_are_bounded_and_expire():
    layout = BlockLayout(64, 1, (8,))
    plans = Plans(Weights(Namespace("model", "1", "float32", layout)), layout.page_tokens)
    for number in range(PLANS_MAX + 1):
        plans.put(_plan(number, f"r{number}"))
    assert plans.get("r0") is None
    assert plans.get("r1").reader_of(0) == "agent-d0"
    plans.put(_plan(9, "late", deadline_s=0.01))
    time.sleep(0.02)
    assert [plan.rid for plan in plans.expired()] == ["late"]
