"""Policies ``split`` and ``n-way``: a hit is divided so that its last byte arrives first.

The paper gives a whole request to one side and names dividing it as future work. Here
every candidate is a vessel that already holds its backlog (seconds); the request's blocks
are poured in until they are gone, which leaves all that got any at one level: the time of
the last byte. ``split`` pours over the two sides, ``n-way`` over every agent, so no storage NIC
idles while a request waits for KV.
"""

from __future__ import annotations

import heapq

import numpy as np

from scheduler.cluster_state import ClusterState
from scheduler.directory.directory import Run
from scheduler.directory.holder_sets import Holders
from scheduler.hit import DELIVERIES, Hit, expected_tier, last_byte_s
from scheduler.one_reader import from_side, in_dram
from scheduler.plan import Range
from scheduler.rows.processes import Device, Floats, Rows


def pour(blocks: int, start_s: Floats, block_s: Floats, least_blocks: int) -> Rows:
    """How many of ``blocks`` each candidate reads; shape as ``start_s``.

    ``start_s``: until the candidate has time; ``block_s``: its time for one block.
    Candidates must be in the order of their start. Nobody gets fewer than about
    ``least_blocks``, but the first alone if there are fewer. The latest end is the least
    that is possible among those that take part.
    """
    part = _level(blocks, start_s, block_s)
    if len(part) > 1 and part.min() < least_blocks:
        keep = part >= least_blocks
        keep[int(np.argmax(part))] = True
        chosen = np.flatnonzero(keep)
        part = np.zeros(len(start_s))
        part[chosen] = _padded(_level(blocks, start_s[chosen], block_s[chosen]), len(chosen))
    shares = np.zeros(len(start_s), np.intp)
    shares[: len(part)] = part
    _hand_out_rest(blocks - int(shares.sum()), shares, np.flatnonzero(part), start_s, block_s)
    return shares


def _level(blocks: int, start_s: Floats, block_s: Floats) -> Floats:
    """Real-valued shares of the first candidates, as many as get something."""
    rate = 1 / block_s
    rates = np.cumsum(rate)
    level_s = (blocks + np.cumsum(rate * start_s)) / rates
    # The first k candidates take part when the k-th one starts below their level.
    k = int(np.count_nonzero(start_s < level_s))
    return np.asarray((level_s[k - 1] - start_s[:k]) * rate[:k])


def _padded(values: Floats, size: int) -> Floats:
    return np.concatenate([values, np.zeros(size - len(values))])


def _hand_out_rest(rest: int, shares: Rows, takers: Rows, start_s: Floats, block_s: Floats) -> None:
    """Give each block that rounding left over to whoever ends earliest with it."""
    if not rest:
        return
    ends = start_s[takers] + (shares[takers] + 1) * block_s[takers]
    heap = list(zip(ends.tolist(), takers.tolist(), strict=True))
    heapq.heapify(heap)
    for _ in range(rest):
        end_s, taker = heap[0]
        shares[taker] += 1
        heapq.heapreplace(heap, (end_s + float(block_s[taker]), taker))


class WaterFilling:
    """``anyone``: over all agents (n-way), else over the two sides (split), if one is alive.

    Tiers: what is in some agent's DRAM is sent from there and read by nobody; what is only on
    SSDs is poured over those that have it; what is remote over all candidates, of which
    those that have it on their SSD read it there. The most constrained blocks go first.
    """

    def __init__(self, anyone: bool) -> None:
        self._anyone = anyone

    def assign(self, hit: Hit, state: ClusterState) -> list[Range]:
        pouring = _Pouring(hit, state, self._anyone)
        alike: dict[tuple[Holders, int], list[Run]] = {}
        ranges: list[Range] = []
        for run in hit.runs:
            if run.holders.dram:
                ranges.append(pouring.from_dram(run))
            else:
                alike.setdefault((run.holders, hit.item_bytes(run.first)), []).append(run)
        for holders, item_bytes in sorted(alike, key=lambda h: (h[0].remote, len(h[0].ssd))):
            ranges += pouring.pour_over(holders, item_bytes, alike[holders, item_bytes])
        ranges.sort(key=lambda part: part.first)
        return self._no_later_than_one_side(ranges, hit, state)

    def _no_later_than_one_side(
        self, ranges: list[Range], hit: Hit, state: ClusterState
    ) -> list[Range]:
        """Blocks of different tiers are poured one kind after the other, and an SSD of the two
        sides may be busier than a third one, which the paper's rule then takes; that rule is
        a bound that must not be exceeded."""
        if len(hit.runs) < 2 and self._anyone:
            return ranges
        side = min(hit.sides, key=state.read_backlog_s, default=None)
        whole = from_side(hit, state, side)
        ends = [last_byte_s(hit, found, state) for found in (ranges, whole)]
        return whole if ends[1] < ends[0] else ranges


def _pace(values: Floats, on_ssd: Rows) -> Floats:
    """Reading and sending overlap: of each agent, the slower of the two, given by device."""
    sending = values[:, Device.COMPUTE_OUT]
    slower = np.maximum(values[:, Device.STORAGE_NIC], sending)
    if len(on_ssd):
        slower[on_ssd] = np.maximum(values[on_ssd, Device.SSD], sending[on_ssd])
    return np.asarray(slower)


def _rows_of(agents: frozenset[str], state: ClusterState) -> Rows:
    """In ascending order."""
    if agents is state.alive_agents:
        return state.agent_rows
    return np.array(sorted(state.agents.row_of[agent] for agent in agents), np.intp)


class _Pouring:
    """One request: the backlogs as they grow by what it has been given so far."""

    def __init__(self, hit: Hit, state: ClusterState, anyone: bool) -> None:
        self._hit = hit
        self._state = state
        self._busy_s = state.backlog_s()
        self._bytes_per_s = state.bytes_per_s.copy()
        self._bytes_per_s[:, Device.COMPUTE_OUT] /= DELIVERIES
        rows = state.agents.row_of
        sides = np.array([rows[agent] for agent in hit.sides], np.intp)
        self._candidates = _rows_of(hit.alive, state) if anyone or not len(sides) else sides

    def from_dram(self, run: Run) -> Range:
        """Whoever has it in memory sends it."""
        agent = in_dram(self._hit, run.holders, self._state)
        row = self._state.agents.row_of[agent]
        nic = Device.COMPUTE_OUT
        run_bytes = run.blocks * self._hit.item_bytes(run.first)
        self._busy_s[row, nic] += run_bytes / self._bytes_per_s[row, nic]
        return Range(run.first, run.blocks, agent, expected_tier(run.holders, agent))

    def pour_over(self, holders: Holders, item_bytes: int, runs: list[Run]) -> list[Range]:
        """Divide blocks, of this size, that are held alike."""
        item_s = item_bytes / self._bytes_per_s
        row_of = self._state.agents.row_of
        on_ssd = np.array([row_of[agent] for agent in holders.ssd], np.intp)
        rows = self._candidates if holders.remote else np.intersect1d(on_ssd, self._candidates)
        rows = rows if len(rows) else on_ssd
        start_s, block_s = (_pace(v, on_ssd)[rows] for v in (self._busy_s, item_s))
        blocks = sum(run.blocks for run in runs)
        options = self._state.options
        readers = max(1, min(options.readers_max, blocks // options.range_min_blocks))
        order = self._first(rows, start_s + blocks / readers * block_s, start_s, readers)
        shares = pour(blocks, start_s[order], block_s[order], options.range_min_blocks)
        rows = rows[order]
        by_device = shares[:, None] * item_s[rows]
        by_device[:, Device.COMPUTE_IN] = 0
        reads_ssd = np.isin(rows, on_ssd) if len(on_ssd) else np.zeros(len(rows), bool)
        by_device[reads_ssd, Device.STORAGE_NIC] = 0
        by_device[~reads_ssd, Device.SSD] = 0
        self._busy_s[rows] += by_device
        return self._cut(holders, runs, rows, shares)

    def _first(self, rows: Rows, fair_end_s: Floats, start_s: Floats, readers: int) -> Rows:
        """Indexes of those who take part: the ``readers`` that would end a fair share first,
        of equals those that were given least so far; in the order of their start."""
        if len(rows) <= readers:
            return np.argsort(start_s, kind="stable")
        limit_s = np.partition(fair_end_s, readers - 1)[readers - 1]
        best, equals = np.flatnonzero(fair_end_s < limit_s), np.flatnonzero(fair_end_s == limit_s)
        given = self._state.agents.assigned_bytes[rows[equals]]
        best = np.concatenate((best, equals[np.argsort(given, kind="stable")]))[:readers]
        return np.asarray(best[np.argsort(start_s[best], kind="stable")])

    def _cut(self, holders: Holders, runs: list[Run], rows: Rows, shares: Rows) -> list[Range]:
        """Ranges of the runs, one after the other, for the agents in ``rows``."""
        names = self._state.agents.names
        shared = [(names[row], share) for row, share in zip(rows, shares.tolist(), strict=True)]
        queue = [entry for entry in shared if entry[1]][::-1]
        ranges = []
        for run in runs:
            first, end = run.first, run.first + run.blocks
            while first < end:
                agent, share = queue.pop()
                taken = min(share, end - first)
                ranges.append(Range(first, taken, agent, expected_tier(holders, agent)))
                first += taken
                if share > taken:
                    queue.append((agent, share - taken))
        return ranges
