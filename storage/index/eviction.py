"""The order in which the blocks of an index go."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from common.block import BlockKey
from storage.index.rows import Rows

IsIdle = Callable[[BlockKey], bool]
_CANDIDATES_MIN = 64
_CANDIDATES_PART = 64
"""A search for victims finds one in so many blocks, so that it costs little a victim."""
_QUEUES_MAX = 64


class EvictionOrder:
    """Leaves first, those with the least scores; one queue for each choice of groups."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._queues: dict[frozenset[int] | None, _VictimQueue] = {}

    def offer(self, row: int) -> None:
        """The block of this row has become a leaf."""
        for queue in self._queues.values():
            queue.offer(row)

    def victims(self, is_idle: IsIdle, groups: Collection[int] | None) -> Iterator[BlockKey]:
        """See :meth:`storage.index.index.BlockIndex.victims`."""
        chosen = None if groups is None else frozenset(groups)
        queue = self._queues.get(chosen)
        if queue is None:
            if len(self._queues) >= _QUEUES_MAX:
                self._queues.clear()
            queue = self._queues[chosen] = _VictimQueue(self._rows, chosen)
        return queue.victims(is_idle)


class _VictimQueue:
    """The leaves with the least scores, found many at a time and checked one by one."""

    def __init__(self, rows: Rows, groups: frozenset[int] | None) -> None:
        self._rows = rows
        self._groups = groups
        self._heap: list[tuple[int, int]] = []
        self._score_max = -1
        """Every leaf with a lesser score is in the heap; so is one that becomes a leaf."""

    def offer(self, row: int) -> None:
        score = self._score(row)
        if score <= self._score_max:
            heapq.heappush(self._heap, (score, row))

    def victims(self, is_idle: IsIdle) -> Iterator[BlockKey]:
        busy: list[tuple[int, int]] = []
        rows = self._rows
        try:
            yield from self._leaves(is_idle, busy)
            size = -1
            while size != len(rows.of):  # whose last child went is a leaf now
                size = len(rows.of)
                self._refill()
                busy.clear()
                yield from self._leaves(is_idle, busy)
            others = self._find(leaves=False)
            for row in sorted(others.tolist(), key=self._score):
                key = rows.keys[row]
                if key is not None and is_idle(key):
                    yield key
        finally:
            for entry in busy:
                heapq.heappush(self._heap, entry)

    def _leaves(self, is_idle: IsIdle, busy: list[tuple[int, int]]) -> Iterator[BlockKey]:
        """What the caller does not pop goes to ``busy``."""
        while self._heap:
            entry = heapq.heappop(self._heap)
            score, row = entry
            key = self._leaf_at(row)
            if key is None:
                continue
            if self._score(row) != score:
                self.offer(row)  # used since
                continue
            busy.append(entry)
            if is_idle(key):
                yield key
                if key not in self._rows.of:
                    busy.pop()

    def _leaf_at(self, row: int) -> BlockKey | None:
        """The block of a row, if it is a leaf of the groups."""
        rows, groups = self._rows, self._groups
        is_leaf = not rows.children[row] and (groups is None or int(rows.groups[row]) in groups)
        return rows.keys[row] if is_leaf else None

    def _refill(self) -> None:
        found = self._find(leaves=True)
        scores = self._rows.scores[found].tolist()
        self._heap = list(zip(scores, found.tolist(), strict=True))
        heapq.heapify(self._heap)
        self._score_max = max(scores, default=-1)

    def _find(self, leaves: bool) -> NDArray[np.int64]:
        """Rows of leaves, or of all other blocks, those with the least scores; unordered."""
        rows = self._rows
        mask = (rows.groups >= 0) & ((rows.children == 0) == leaves)
        if self._groups is not None:
            mask &= np.isin(rows.groups, list(self._groups))
        found = np.flatnonzero(mask)
        count = max(_CANDIDATES_MIN, len(rows.of) // _CANDIDATES_PART)
        if leaves and len(found) > count:
            found = found[np.argpartition(rows.scores[found], count)[:count]]
        return found

    def _score(self, row: int) -> int:
        return int(self._rows.scores[row])
