"""Pages that a transfer may still touch are not given out again.

A one-sided write that failed or timed out can land late, and a one-sided read of a page
that was freed and reused would store another request's KV under this block's key. So
every page is *held* from the moment a job names it until the job is known to have ended.
SGLang may free a held page at any time (abort, eviction, flush); the free is deferred.
Holds of jobs whose end is overdue are the quarantine of the design.

A part of the model's state that has a pool of its own (windows, states) has holds of its own: a
job names pages of each pool, and lets go of all at once. Parts may share a pool, and its holds.

SGLang's accounting stays exact: deferred pages are reported as held by sessions, which its
leak check adds up, and pages that are held but not yet freed are taken off the decode
engine's allocation budget, since evicting them yields nothing.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence

import torch

from common.ids import JobId
from engine.sglang.views import Allocator


class PageHolds:
    """Holds by job. ``hold`` and ``release`` may come from any thread; everything that
    touches the allocator runs in the scheduler's thread."""

    def __init__(self, allocator: Allocator, parts: Sequence[PageHolds] = ()) -> None:
        """``parts``: of the pools of the namespace's parts, in their order."""
        self.allocator = allocator
        self.parts = parts
        self._lock = threading.Lock()
        self._pages_of: dict[int, list[int]] = {}
        self._holders: Counter[int] = Counter()
        self._coming: dict[int, int] = {}
        self._deferred: set[int] = set()
        self._returned: deque[list[int]] = deque()

    def of(self, allocator: object) -> PageHolds | None:
        """Those of one allocator, if it is one of ours."""
        return next((each for each in (self, *self.parts) if each.allocator is allocator), None)

    def expect(self, job: JobId, pages: int, of_parts: Sequence[int] = ()) -> None:
        """So many, of which ``job`` is to be told later: they count from now on, since ranks learn
        which they are at times of their own and are to admit the same requests."""
        with self._lock:
            self._coming[job] = pages
        for part, count in zip(self.parts, of_parts, strict=False):
            part.expect(job, count)

    def hold(
        self, job: JobId, pages: Iterable[int], of_parts: Sequence[Iterable[int]] = ()
    ) -> None:
        """``job`` may touch these pages too from now on."""
        with self._lock:
            self._coming.pop(job, None)
            held = list(pages)
            self._pages_of.setdefault(job, []).extend(held)
            self._holders.update(held)
        for part, places in zip(self.parts, of_parts, strict=False):
            part.hold(job, places)

    def release(self, job: JobId) -> None:
        """No transfer of ``job`` is in flight any more. Unknown jobs are ignored."""
        for part in self.parts:
            part.release(job)
        with self._lock:
            self._coming.pop(job, None)
            free_now = []
            for page in self._pages_of.pop(job, ()):
                self._holders[page] -= 1
                if self._holders[page] == 0:
                    del self._holders[page]
                    if page in self._deferred:
                        free_now.append(page)
            if free_now:
                self._returned.append(free_now)

    def pages_of(self, jobs: Iterable[int]) -> int:
        """How many distinct pages these jobs hold; of parts, of which they hold no more, none."""
        with self._lock:
            return len({page for job in jobs for page in self._pages_of.get(job, ())})

    @property
    def deferred_tokens(self) -> int:
        """Freed by SGLang, kept back here."""
        return len(self._deferred) * self.allocator.page_size

    @property
    def free_tokens(self) -> int:
        """What the allocator can give out, for any thread: its own ``available_size`` is
        hooked, and for the scheduler's thread only."""
        pages = len(self.allocator.free_pages) + self.allocator.num_staged_pages
        with self._lock:
            pages += sum(map(len, self._returned))
        return int(pages * self.allocator.page_size)

    @property
    def unevictable_tokens(self) -> int:
        """Held, or soon, and still owned by a request or the radix tree."""
        with self._lock:
            pages = len(self._holders.keys() - self._deferred) + sum(self._coming.values())
        return pages * self.allocator.page_size

    def held_pages(self) -> list[int]:
        """Every page that a transfer may touch now."""
        with self._lock:
            return list(self._holders)

    # ---- the scheduler's thread: hooks on PagedTokenToKVPoolAllocator ----

    def keep_back(self, page_ids: torch.Tensor) -> torch.Tensor:
        """Of pages about to become free, those that may; the others are deferred."""
        with self._lock:
            if not self._holders:
                return page_ids
            held = torch.tensor(list(self._holders), dtype=page_ids.dtype, device=page_ids.device)
            is_held = torch.isin(page_ids, held)
            self._deferred.update(page_ids[is_held].tolist())
            return page_ids[~is_held]

    def take_returned(self) -> list[int]:
        """Deferred pages whose last job has ended since the last call."""
        pages: list[int] = []
        with self._lock:
            while self._returned:
                pages += [p for p in self._returned.popleft() if p in self._deferred]
            self._deferred.difference_update(pages)
        return pages

    def after_clear(self) -> None:
        """The allocator just declared every page free: take the held ones out again."""
        with self._lock:
            self._returned.clear()
            self._deferred = set(self._holders)
            if not self._deferred:
                return
            free = self.allocator.free_pages
            held = torch.tensor(list(self._deferred), dtype=free.dtype, device=free.device)
            self.allocator.free_pages = free[~torch.isin(free, held)]
