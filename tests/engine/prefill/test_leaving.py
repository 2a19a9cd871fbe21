"""When the next batch is formed: not while memory that it lacks is about to be free."""

from types import SimpleNamespace
from typing import Any

import pytest

from engine.prefill import leaving
from engine.prefill.leaving import LeavingRequests

FREE = 1000


def leaving_requests(scheduler: Any) -> LeavingRequests:
    return LeavingRequests(scheduler)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(leaving, "POLL_S", 0.0)


def request(rid: str, tokens: int = 600, parked: bool = False) -> SimpleNamespace:
    return SimpleNamespace(rid=rid, origin_input_ids=[0] * tokens, pending_bootstrap=parked)


class Scheduler:
    """Requests leave after so many polls, each with its tokens."""

    def __init__(self, leave_after: dict[str, int], waiting_tokens: int, parked: bool = False):
        self.disagg_prefill_inflight_queue = [request(rid, parked=parked) for rid in leave_after]
        self.waiting_queue = [request("next", waiting_tokens)] if waiting_tokens else []
        self.free = FREE
        self.token_to_kv_pool_allocator = SimpleNamespace(available_size=lambda: self.free)
        self.tree_cache = SimpleNamespace(evictable_size=lambda: 0)
        self.polls = 0
        self._leave_after = leave_after

    def poll(self) -> list[Any]:
        self.polls += 1
        queue = self.disagg_prefill_inflight_queue
        left = [req for req in queue if self._leave_after[req.rid] <= self.polls]
        self.disagg_prefill_inflight_queue = [req for req in queue if req not in left]
        self.free += sum(len(req.origin_input_ids) for req in left)
        return left


def test_a_batch_that_lacks_memory_waits_for_all_that_leaves():
    scheduler = Scheduler({"a": 2, "b": 5}, waiting_tokens=2 * FREE)
    left = leaving_requests(scheduler).wait(scheduler.poll)
    assert [req.rid for req in left] == ["a", "b"] and scheduler.polls == 5


@pytest.mark.parametrize("waiting_tokens", [0, FREE])
def test_nobody_waits_for_memory_that_is_not_lacked(waiting_tokens):
    scheduler = Scheduler({"a": 3}, waiting_tokens)
    assert leaving_requests(scheduler).wait(scheduler.poll) == [] and scheduler.polls == 1


def test_memory_that_suffices_ends_the_wait():
    scheduler = Scheduler({"a": 2, "b": 9}, waiting_tokens=FREE + 600)
    leaving_requests(scheduler).wait(scheduler.poll)
    assert scheduler.polls == 2


def test_a_request_that_does_not_leave_is_waited_for_once():
    scheduler = Scheduler({"hung": 10**6}, waiting_tokens=2 * FREE)
    requests = leaving_requests(scheduler)
    requests.wait(scheduler.poll)
    assert scheduler.polls == 1 + leaving.POLLS_MAX
    requests.wait(scheduler.poll)
    assert scheduler.polls == 2 + leaving.POLLS_MAX


def test_a_request_that_has_not_met_its_decode_engine_is_not_leaving():
    scheduler = Scheduler({"parked": 3}, waiting_tokens=2 * FREE, parked=True)
    leaving_requests(scheduler).wait(scheduler.poll)
    assert scheduler.polls == 1
