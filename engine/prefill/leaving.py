"""Prefill engine: a batch is not formed of what the one before has left over.

SGLang forms a batch of the requests for which there is memory at that moment. Pages of a
forward that has just ended become free when its last layers have left, some milliseconds
later. Formed before, the batch is as small as the rest of the pool, the next one has all but
that, and so on: with room for four requests, forwards of one and of three by turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.sglang.views import Request, Scheduler

POLL_S = 0.001
POLLS_MAX = 50
"""For requests that leave, all of a batch together; a slow decode engine holds up nobody longer."""


class LeavingRequests:
    """Waits for requests whose forward has ended, where others lack their memory.

    All ranks wait alike: what is looked at is the same at all, and
    polls are counted, not timed.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._given_up: set[str] = set()

    def wait(self, poll: Callable[[], list[Request]]) -> list[Request]:
        """``poll()`` returns requests that have left, whose pages it has freed. Returns all
        that left meanwhile."""
        left = poll()
        for _ in range(POLLS_MAX):
            if not self._leaving() or not self._lacks_memory():
                break
            time.sleep(POLL_S)
            left += poll()
        else:
            self._given_up |= self._leaving()
        self._given_up &= {req.rid for req in self._scheduler.disagg_prefill_inflight_queue}
        return left

    def _leaving(self) -> set[str]:
        """Requests whose KV is on its way, but those that were waited for once."""
        queue = self._scheduler.disagg_prefill_inflight_queue
        return {req.rid for req in queue if not req.pending_bootstrap} - self._given_up

    def _lacks_memory(self) -> bool:
        scheduler = self._scheduler
        wanted = sum(len(req.origin_input_ids) for req in scheduler.waiting_queue)
        free = scheduler.token_to_kv_pool_allocator.available_size()
        return wanted > free + scheduler.tree_cache.evictable_size()
