"""Read policies that give each run of alike blocks to one reader: the paper's, and Basic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from scheduler.cluster_state import ClusterState
from scheduler.directory.directory import Run
from scheduler.directory.holder_sets import Holders
from scheduler.hit import Hit, expected_tier
from scheduler.plan import Range


class OneSide:
    """One fixed side reads whatever it can; a block that it cannot read comes from a holder.

    ``prefill``: the paper's PE path, which is how P/D disaggregation reads today (Basic).
    ``decode``: everything through the DE's side.
    """

    def __init__(self, side: str) -> None:
        self._side = side

    def assign(self, hit: Hit, state: ClusterState) -> list[Range]:
        side = hit.prefill_agent if self._side == "prefill" else hit.decode_agent
        return from_side(hit, state, side if side in hit.alive else None, dram_first=False)


class RoundRobin:
    """Both paths without a scheduler, the paper's ablation (section 7.4): requests take the
    PE and the DE path in turns, and engines are taken in turns as well. Each decode node has
    turns of its own: common ones would stay in step with an even number of decode engines,
    and half of their storage NICs would never read."""

    rotates_engines = True

    def __init__(self) -> None:
        self._turns: Counter[str] = Counter()

    def assign(self, hit: Hit, state: ClusterState) -> list[Range]:
        self._turns[hit.decode_agent] += 1
        sides, turn = hit.sides, self._turns[hit.decode_agent]
        return from_side(hit, state, sides[turn % len(sides)] if sides else None)


class ShorterQueue:
    """The paper's rule (section 6.1): the side with the shorter read queue reads all. Where neither
    side's agent may read, the paper's nodes have no reader; here it is the agent, of all that may,
    with the shortest queue.

    What some agent has in DRAM already is delivered from there, without a read.
    """

    def assign(self, hit: Hit, state: ClusterState) -> list[Range]:
        may_read = hit.sides or sorted(hit.alive)
        return from_side(hit, state, min(may_read, key=state.read_backlog_s, default=None))


def from_side(
    hit: Hit, state: ClusterState, side: str | None, dram_first: bool = True
) -> list[Range]:
    """Every block from ``side`` where it can have it, else from the least busy holder."""

    def reader(holders: Holders) -> str | None:
        if dram_first and holders.dram:
            return in_dram(hit, holders, state)
        if side is not None and holders.tier_at(side) is not None:
            return side
        return holder(holders, state)

    return until_none((run, reader(run.holders)) for run in hit.runs)


def until_none(readers: Iterable[tuple[Run, str | None]]) -> list[Range]:
    """Ranges of the runs, up to the first that has no reader."""
    ranges = []
    for run, agent in readers:
        if agent is None:
            break
        ranges.append(Range(run.first, run.blocks, agent, expected_tier(run.holders, agent)))
    return ranges


def in_dram(hit: Hit, holders: Holders, state: ClusterState) -> str:
    """An agent that has the block in memory: P's, else D's, else the least busy."""
    for side in hit.sides:
        if side in holders.dram:
            return side
    return min(holders.dram, key=state.read_backlog_s)


def holder(holders: Holders, state: ClusterState) -> str | None:
    """The least busy agent that has the block in memory, or else on its SSD."""
    return min(holders.dram or holders.ssd, key=state.read_backlog_s, default=None)
