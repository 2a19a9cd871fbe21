"""The fence: pages of a failed delivery come back on evidence that no byte of it can land.

Time is none. A sender that has given a write up, or was killed, leaves its kernel to send what is
left, for minutes if the network lets it; a partition or a suspended process only makes it later.
The evidence is that there is no socket left over which such bytes could come:

1. the agent, or the incarnation that has replaced it, says that nothing more of what has failed
   is under way from its process, and which connections from its host are some process's
   (:mod:`transfer.agent.fences`);
2. every other connection from that host, of those that there were before it was asked again, is
   cut at this end, at every rank, which the kernel's table of connections shows to be done. What
   still comes for it is answered with a reset.

Until then the pages stay held, as those of an agent that is not heard; their number is bounded
(:mod:`engine.watchdog`).
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Set

import msgspec

from common.ids import JobId
from common.messages import FENCE_JOBS_MAX, AskFence, Fenced
from common.samples import Sample, sample
from engine.ranks.group import CutConnections, Links
from engine.transfers.jobs import Jobs
from transfer.connections import Connection, Endpoint, connections, own_sockets

log = logging.getLogger(__name__)

ASK_AGAIN_S = 1.0


class _Fence(msgspec.Struct):
    """Of jobs that one agent had begun and that had stopped before it was asked."""

    number: int
    jobs: list[JobId]
    began_s: float
    asked_s: float
    candidates: Mapping[Connection, int] | None = None
    """Connections, and their sockets, that were not live when the agent answered, or have been
    opened since; None: no answer yet."""
    late: Mapping[Connection, int] | None = None
    """Those of them that were not live when it answered again: their bytes could come there."""


class Fences:
    """One at a time for each agent, in the leader. Thread-safe.

    ``ports``: where the ranks' Mooncake takes connections. ``post`` lets an event take effect at
    every rank.
    """

    def __init__(
        self,
        jobs: Jobs,
        links: Links,
        ports: Collection[int],
        post: Callable[[CutConnections], None],
    ) -> None:
        self._jobs = jobs
        self._links = links
        self._ports = frozenset(ports) - {0}
        self._post = post
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._open: dict[str, _Fence] = {}
        self.passed_total = 0
        self.waited_s_total = 0.0
        self.cut_total = 0

    def look(self) -> None:
        """Ask, cut, and let pass; to be called a few times a second."""
        with self._lock:
            for agent, stopped in self._jobs.stopped().items():
                if agent not in self._open:
                    number, jobs = next(self._numbers), stopped[:FENCE_JOBS_MAX]
                    self._open[agent] = _Fence(number, jobs, time.monotonic(), 0.0)
            for agent, fence in list(self._open.items()):
                if fence.late is None:
                    self._ask(agent, fence)
                elif not self._cut(fence.late):
                    del self._open[agent]
                    self._passed(fence)

    def answered(self, agent: str, message: Fenced) -> None:
        """The agent's part is done."""
        with self._lock:
            fence = self._open.get(agent)
            if fence is None or fence.number != message.number or fence.late is not None:
                return
            live = {Endpoint(host, port) for host, port in message.live}
            if fence.candidates is None:
                fence.candidates = self._from(set(message.hosts), live)
                if fence.candidates:  # to another number, since it may have been asked twice
                    fence.number, fence.asked_s = next(self._numbers), 0.0
                    self._ask(agent, fence)
                    return
            found = fence.candidates.items()
            fence.late = {each: inode for each, inode in found if each.there not in live}
            self.cut_total += len(fence.late)

    def samples(self) -> Iterator[Sample]:
        """For the metrics."""
        yield sample("engine_fences_total", self.passed_total)
        yield sample("engine_fence_seconds_total", self.waited_s_total)
        yield sample("engine_cut_connections_total", self.cut_total)

    def _ask(self, agent: str, fence: _Fence) -> None:
        if time.monotonic() - fence.asked_s >= ASK_AGAIN_S:
            fence.asked_s = time.monotonic()
            self._links.send(agent, AskFence(fence.number, fence.jobs))

    def _from(self, hosts: Set[str], live: Set[Endpoint]) -> dict[Connection, int]:
        """Connections to the ranks from these hosts that are not live, by now."""
        return {
            connection: inode
            for connection, inode in connections(self._ports)
            if connection.here.port in self._ports
            and connection.there.host in hosts
            and connection.there not in live
        }

    def _cut(self, late: Mapping[Connection, int]) -> bool:
        """Whether any of them is still there; it is cut then."""
        if not late:
            return False
        there, own = dict(connections(self._ports)), own_sockets()
        # One that nobody had taken when the agent answered has a number by now.
        left = [there.get(each, inode) for each, inode in late.items() if each in there]
        if left:
            self._post(CutConnections(left))
        return bool(left) or any(inode in own for inode in late.values())

    def _passed(self, fence: _Fence) -> None:
        waited_s = time.monotonic() - fence.began_s
        self.passed_total += 1
        self.waited_s_total += waited_s
        log.info("fence passed jobs=%s seconds=%.2f", fence.jobs, waited_s)
        for job in fence.jobs:
            self._jobs.over(job)
