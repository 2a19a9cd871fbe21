"""Jobs: every one-sided transfer that an agent makes for this engine, from issue to end.

A job is *open* from the moment its message is sent until the agent says that it ended, or
until the agent is known to be dead, which is when it shows a newer incarnation (its
supervisor has killed the old process) and a grace second for bytes that were already in
the kernel has passed. A suspended agent is not dead: its jobs stay open, and the pages
that they name stay held (:mod:`engine.transfers.page_holds`).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import msgspec

from common.ids import Incarnation, JobId
from common.samples import Sample, sample
from engine.transfers.page_holds import PageHolds

DEATH_GRACE_S = 1.0


class OpenJob(msgspec.Struct):
    """``failed`` is called with the reason as soon as one is known, from any thread; ``ended``
    once, with "" or the reason, when the job is closed."""

    job: JobId
    agent: str
    incarnation: Incarnation
    deadline: float
    ended: Callable[[str], None]
    failed: Callable[[str], None]
    is_over: bool = False
    """Known to have ended; not yet at every rank."""
    dead_since: float | None = None


class Jobs:
    """The table of open jobs. Job numbers grow over restarts and are never reused.

    Every rank of an engine opens the same jobs in the same order. ``tell(job, reason)`` makes
    an end that is known here known to all ranks, which :meth:`close` the job then; without
    it there is one rank.
    """

    def __init__(
        self,
        incarnation: Incarnation,
        holds: PageHolds,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[JobId, str], None] | None = None,
    ) -> None:
        self._tell = tell or self.close
        self._numbers = itertools.count(((incarnation & 0x7FFFFFFF) << 16) + 1)
        self._holds = holds
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[JobId, OpenJob] = {}
        self._newest: dict[str, Incarnation] = {}

    def open(
        self,
        agent: str,
        incarnation: Incarnation,
        pages: Iterable[int],
        timeout_s: float,
        ended: Callable[[str], None],
        failed: Callable[[str], None] = lambda reason: None,
    ) -> JobId:
        """Number a job of ``agent``'s present incarnation and hold its pages, as far as they are
        known: of others see :meth:`hold`."""
        with self._lock:
            job = JobId(next(self._numbers))
            now = self._clock()
            opened = OpenJob(job, agent, incarnation, now + timeout_s, ended, failed)
            if incarnation < self._newest.get(agent, incarnation):
                opened.dead_since = now  # it restarted since the caller looked
            self._open[job] = opened
        self._holds.hold(job, pages)
        return job

    def hold(self, job: JobId, pages: Iterable[int]) -> bool:
        """Hold the pages of a job that was opened without any; False if it has ended since."""
        with self._lock:
            if job not in self._open:
                return False
            self._holds.hold(job, pages)
            return True

    def over(self, job: JobId, reason: str = "") -> None:
        """The job has ended: nothing of it is in flight. Unknown jobs are ignored."""
        opened = self._open.get(job)
        if opened is None or opened.is_over:
            return
        opened.is_over = True
        if reason:
            opened.failed(reason)
        self._tell(job, reason)

    def close(self, job: JobId, reason: str = "") -> None:
        """Every rank knows of the end. Unknown jobs are ignored."""
        with self._lock:
            opened = self._open.pop(job, None)
        if opened is not None:
            self._holds.release(job)
            opened.ended(reason)

    def of_incarnation(self, job: JobId, agent: str, incarnation: Incarnation) -> bool:
        """Whether an agent's message about a job comes from the incarnation that has it."""
        opened = self._open.get(job)
        return opened is not None and (opened.agent, opened.incarnation) == (agent, incarnation)

    def agent_restarted(self, agent: str, incarnation: Incarnation) -> None:
        """Jobs of earlier incarnations of this agent will end after the grace period."""
        now = self._clock()
        with self._lock:
            self._newest[agent] = incarnation
            for opened in self._open.values():
                is_older = opened.agent == agent and opened.incarnation < incarnation
                if is_older and opened.dead_since is None:
                    opened.dead_since = now

    def reap(self) -> None:
        """End the jobs of dead incarnations; call a few times a second."""
        now = self._clock()
        with self._lock:
            dead = [
                opened
                for opened in self._open.values()
                if opened.dead_since is not None and now - opened.dead_since >= DEATH_GRACE_S
            ]
        for opened in dead:
            self.over(opened.job, f"agent {opened.agent} died")

    def overdue(self) -> list[JobId]:
        """Jobs past their deadline whose end is not known: their pages are in quarantine."""
        now = self._clock()
        with self._lock:
            return [o.job for o in self._open.values() if now > o.deadline and not o.is_over]

    def quarantined_pages(self) -> int:
        """How many pages those jobs hold."""
        return self._holds.pages_of(self.overdue())

    def samples(self) -> Iterator[Sample]:
        """For the metrics."""
        yield sample("engine_open_jobs", len(self))
        yield sample("engine_quarantined_pages", self.quarantined_pages())

    def __len__(self) -> int:
        return len(self._open)
