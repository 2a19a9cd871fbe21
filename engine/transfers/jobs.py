"""Jobs: every one-sided transfer that an agent makes for this engine, from issue to end.

A job is *open* from the moment its message is sent until the agent says that it ended well.
One that has failed in mid-write, or whose agent shows a newer incarnation (its supervisor has
seen the end of the old process), has *stopped*: nobody begins anything for it any more, but
bytes may be on their way. It is over when a fence (:mod:`engine.transfers.fence`) has passed. A
suspended agent's jobs stay open, and the pages that they name stay held
(:mod:`engine.transfers.page_holds`).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from common.ids import Incarnation, JobId
from common.samples import Sample, sample
from engine.transfers.page_holds import PageHolds


class OpenJob(msgspec.Struct):
    """``failed`` is called with the reason as soon as one is known, from any thread; ``ended``
    once, with "" or the reason, when the job is closed."""

    job: JobId
    agent: str
    host: str
    """Where that is, as the engine is linked to it."""
    incarnation: Incarnation
    deadline: float
    ended: Callable[[str], None]
    failed: Callable[[str], None]
    stopped: str = ""
    """Why nobody begins anything for it any more, though bytes may still land."""
    is_over: bool = False
    """Known to have ended; not yet at every rank."""


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
        self.host_of: Callable[[str], str] = lambda agent: ""
        """Where an agent of that name is now."""

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
            host = self.host_of(agent)
            opened = OpenJob(job, agent, host, incarnation, now + timeout_s, ended, failed)
            if incarnation < self._newest.get(agent, incarnation):
                opened.stopped = _restarted(agent)  # since the caller looked
            self._open[job] = opened
        self._holds.hold(job, pages)
        return job

    def expect(self, job: JobId, pages: int, of_parts: Sequence[int] = ()) -> None:
        """Count so many pages as held until :meth:`hold` names them."""
        with self._lock:
            if job in self._open:
                self._holds.expect(job, pages, of_parts)

    def hold(
        self, job: JobId, pages: Iterable[int], of_parts: Sequence[Iterable[int]] = ()
    ) -> bool:
        """Hold the pages of a job that was opened without any; False if it has ended since."""
        with self._lock:
            if job not in self._open:
                return False
            self._holds.hold(job, pages, of_parts)
            return True

    def has_stopped(self, job: JobId) -> bool:
        """Nobody may begin it any more: a fence is for it, or will be."""
        opened = self._open.get(job)
        return opened is not None and bool(opened.stopped)

    def stopped_writing(self, job: JobId, reason: str) -> None:
        """The job has failed, and bytes of it may still land. Unknown jobs are ignored."""
        opened = self._open.get(job)
        if opened is not None and not opened.stopped and not opened.is_over:
            opened.stopped = reason
            opened.failed(reason)

    def over(self, job: JobId, reason: str = "") -> None:
        """The job has ended: nothing of it is in flight. Unknown jobs are ignored."""
        opened = self._open.get(job)
        if opened is None or opened.is_over:
            return
        opened.is_over = True
        if reason and not opened.stopped:
            opened.failed(reason)
        reason = opened.stopped or reason
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
        """The agent's earlier incarnations are dead."""
        with self._lock:
            self._newest[agent] = incarnation
            older = [
                opened.job
                for opened in self._open.values()
                if opened.agent == agent and opened.incarnation < incarnation
            ]
        for job in older:
            self.stopped_writing(job, _restarted(agent))

    def stopped(self) -> dict[str, list[JobId]]:
        """Jobs that have stopped and are not over, by agent: of those that are where they were.
        One of the same name on another host knows nothing of the process that began a job."""
        found: dict[str, list[JobId]] = defaultdict(list)
        with self._lock:
            for opened in self._open.values():
                is_there = opened.host == self.host_of(opened.agent)
                if opened.stopped and not opened.is_over and is_there:
                    found[opened.agent].append(opened.job)
        return found

    def quarantined(self) -> list[JobId]:
        """Jobs that have stopped, or are past their deadline, and whose end is not known."""
        now = self._clock()
        with self._lock:
            late = [o for o in self._open.values() if o.stopped or now > o.deadline]
        return [opened.job for opened in late if not opened.is_over]

    def quarantined_pages(self) -> int:
        """How many pages those jobs hold."""
        return self._holds.pages_of(self.quarantined())

    def samples(self) -> Iterator[Sample]:
        """For the metrics."""
        yield sample("engine_open_jobs", len(self))
        yield sample("engine_quarantined_pages", self.quarantined_pages())

    def __len__(self) -> int:
        return len(self._open)


def _restarted(agent: str) -> str:
    return f"agent {agent} died"
