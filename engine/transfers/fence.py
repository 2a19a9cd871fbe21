"""The fence: pages of a failed delivery come back on evidence that no byte of it can land.

Time is none. A sender that has given a write up, or was killed, leaves its kernel to send what is
left, for minutes if the network lets it; a partition or a suspended process only makes it later.
The evidence is that there is no socket left over which such bytes could come:

1. the agent, or the incarnation that has replaced it on its host, says that nothing more of what
   has failed is under way from its process, and which connections from its host are some
   process's (:mod:`transfer.agent.fences`);
2. every other connection from that host, of those that there were before it was asked again, is
   cut at this end, by every rank on its own host, whose kernel's table of connections shows it to
   be done. What still comes for it is answered with a reset.

Until then the pages stay held, as those of an agent that is not heard; their number is bounded
(:mod:`engine.watchdog`).
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from common.ids import JobId
from common.messages.fields import FENCE_JOBS_MAX
from common.messages.from_agents import Fenced
from common.messages.from_engines import AskFence
from common.samples import Sample, sample
from engine.ranks.group import CutConnections, FindConnections, Links
from engine.transfers.jobs import Jobs
from transfer.connections import Connection, Endpoint, connections, cut, own_sockets

log = logging.getLogger(__name__)

ASK_AGAIN_S = 1.0


class _Fence(msgspec.Struct):
    """Of jobs that one agent had begun and that had stopped before it was asked."""

    host: str
    """Of that agent."""
    number: int
    jobs: list[JobId]
    began_s: float
    asked_s: float
    candidates: Sequence[Mapping[Connection, int]] | None = None
    """By rank: connections, and their sockets, that were not live when the agent answered, or have
    been opened since; None: no answer yet."""
    late: list[dict[Connection, int]] | None = None
    """Those of them that were not live when it answered again: their bytes could come there."""
    is_with_ranks: bool = False
    """They have not all looked yet."""


class RankConnections:
    """A rank's part: connections to the port where its Mooncake takes them; 0: none."""

    def __init__(self, port: int) -> None:
        self._ports = frozenset({port}) - {0}

    def find(self, hosts: Sequence[str], live: Sequence[Endpoint]) -> dict[Connection, int]:
        """Those from these hosts that are not live, by now, and their sockets."""
        from_there, known = set(hosts), set(live)
        return {
            connection: inode
            for connection, inode in connections(self._ports)
            if connection.here.port in self._ports
            and connection.there.host in from_there
            and connection.there not in known
        }

    def cut(self, late: Mapping[Connection, int]) -> bool:
        """Whether any of them is still there; it is cut then."""
        if not late:
            return False
        there, own = dict(connections(self._ports)), own_sockets()
        # One that nobody had taken when the agent answered has a number by now.
        left = [there.get(each, inode) for each, inode in late.items() if each in there]
        cut(left)
        return bool(left) or any(inode in own for inode in late.values())


class Fences:
    """One at a time for each agent, in the leader. Thread-safe.

    ``post`` lets an event take effect at every rank: what they find, each on its own host, comes
    back by :meth:`found` and :meth:`were_cut`.
    """

    def __init__(
        self,
        jobs: Jobs,
        links: Links,
        post: Callable[[FindConnections | CutConnections], None],
    ) -> None:
        self._jobs = jobs
        self._links = links
        self._post = post
        self._lock = threading.RLock()  # alone, a rank answers at once
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
                    host, number = self._links.host(agent), next(self._numbers)
                    jobs = stopped[:FENCE_JOBS_MAX]
                    self._open[agent] = _Fence(host, number, jobs, time.monotonic(), 0.0)
            for agent, fence in list(self._open.items()):
                if fence.is_with_ranks:
                    continue
                if fence.late is None and fence.host != self._links.host(agent):
                    del self._open[agent]  # who could answer now knows nothing of it
                elif fence.late is None:
                    self._ask(agent, fence)
                elif any(fence.late):
                    self._ask_ranks(fence, CutConnections(agent, fence.number, fence.late))
                else:
                    del self._open[agent]
                    self._passed(fence)

    def answered(self, agent: str, message: Fenced) -> None:
        """The agent's part is done."""
        with self._lock:
            fence = self._open.get(agent)
            if fence is None or fence.number != message.number or fence.late is not None:
                return
            live = [Endpoint(host, port) for host, port in message.live]
            if fence.candidates is None:
                if not fence.is_with_ranks:
                    question = FindConnections(agent, fence.number, message.hosts, live)
                    self._ask_ranks(fence, question)
                return
            fence.late = [
                {each: inode for each, inode in of_rank.items() if each.there not in live}
                for of_rank in fence.candidates
            ]
            self.cut_total += sum(map(len, fence.late))

    def found(self, event: FindConnections, of_ranks: Sequence[Mapping[Connection, int]]) -> None:
        """All ranks have looked."""
        with self._lock:
            fence = self._open[event.agent]
            fence.is_with_ranks, fence.candidates = False, of_ranks
            if any(of_ranks):  # to another number, since it may have been asked twice
                fence.number, fence.asked_s = next(self._numbers), 0.0
                self._ask(event.agent, fence)
            else:
                fence.late = []

    def were_cut(self, event: CutConnections, are_left: Sequence[bool]) -> None:
        """All ranks have looked for what they were to cut: where it is gone, there is no more."""
        with self._lock:
            fence = self._open[event.agent]
            fence.is_with_ranks = False
            fence.late = event.late if any(are_left) else []

    def samples(self) -> Iterator[Sample]:
        """For the metrics."""
        yield sample("engine_fences_total", self.passed_total)
        yield sample("engine_fence_seconds_total", self.waited_s_total)
        yield sample("engine_cut_connections_total", self.cut_total)

    def _ask(self, agent: str, fence: _Fence) -> None:
        is_there = fence.host == self._links.host(agent)
        if is_there and time.monotonic() - fence.asked_s >= ASK_AGAIN_S:
            fence.asked_s = time.monotonic()
            self._links.send(agent, AskFence(fence.number, fence.jobs))

    def _ask_ranks(self, fence: _Fence, event: FindConnections | CutConnections) -> None:
        fence.is_with_ranks = True
        try:
            self._post(event)
        except OSError:  # no descriptor for /proc, say: it is tried again
            fence.is_with_ranks = False
            raise

    def _passed(self, fence: _Fence) -> None:
        waited_s = time.monotonic() - fence.began_s
        self.passed_total += 1
        self.waited_s_total += waited_s
        log.info("fence passed jobs=%s seconds=%.2f", fence.jobs, waited_s)
        for job in fence.jobs:
            self._jobs.over(job)
