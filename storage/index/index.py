"""Which blocks a tier holds, where they lie, and which of them go first.

Eviction takes leaves first: a block is of no use without its parent, so a parent stays
while a child is here. Among leaves it takes the one with the least *score*: when the block
was last used, counted in uses, plus a bonus for earlier uses. docs/storage.md has the
comparison with LRU and Belady's rule.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from common.block import NO_PARENT, BlockKey
from storage.index.use_counts import UseCounts

BONUS_PART = 0.3
"""An earlier use makes a block younger by this part of all blocks that are held."""
BONUS_USES_MAX = 4
_CANDIDATES_MIN = 64
_CANDIDATES_PART = 64
"""A search for victims finds one in so many blocks, so that it costs little a victim."""
_QUEUES_MAX = 64


class BlockIndex:
    """Key -> place, with the order of eviction. About 250 bytes a block.

    ``group`` is a small number of the caller's, by which victims can be chosen. A block
    has a row in some arrays, so that searches are vectorised.
    """

    def __init__(self) -> None:
        self._rows: dict[BlockKey, int] = {}
        self._keys: list[BlockKey | None] = []
        self._parents: list[BlockKey] = []
        self._free: list[int] = []
        self._place = np.zeros(0, np.int64)
        self._score = np.zeros(0, np.int64)
        self._children = np.zeros(0, np.int32)
        self._group = np.full(0, -1, np.int32)
        """-1: the row is free."""
        self._awaited: dict[BlockKey, int] = {}
        """Parents that are not here, with the number of their children that are."""
        self._clock = 0
        self._uses = UseCounts()
        self._queues: dict[frozenset[int] | None, _VictimQueue] = {}

    # ---- a mapping --------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[BlockKey]:
        return iter(self._rows)

    def get(self, key: BlockKey) -> int | None:
        """The block's place; None if it is not here."""
        row = self._rows.get(key)
        return None if row is None else int(self._place[row])

    def group(self, key: BlockKey) -> int:
        """Raises KeyError."""
        return int(self._group[self._rows[key]])

    def add(self, key: BlockKey, place: int, parent: BlockKey = NO_PARENT, group: int = 0) -> None:
        """A block that is not here yet; it counts as used now."""
        if not self._free:
            self._grow(max(64, 2 * len(self._keys)))
        row = self._free.pop()
        self._rows[key], self._keys[row], self._parents[row] = row, key, parent
        self._place[row], self._group[row] = place, group
        self._children[row] = self._awaited.pop(key, 0)
        self._clock += 1
        earlier_uses = min(self._uses.at_least_once(key) - 1, BONUS_USES_MAX)
        self._score[row] = self._clock + int(BONUS_PART * len(self._rows) * earlier_uses)
        self._count_child(parent, 1)

    def add_many(self, keys: Sequence[BlockKey], places: NDArray[np.int64], group: int) -> None:
        """Different blocks that are not here yet, of unknown parents, all at once: each counts
        as used now, and no use is counted. For indexes that choose no victims by use."""
        count = len(keys)
        if len(self._free) < count:
            self._grow(max(len(self._keys) + count, 2 * len(self._keys)))
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        rows = np.array(taken, np.int64)
        self._rows.update(zip(keys, taken, strict=True))
        for row, key in zip(taken, keys, strict=True):
            self._keys[row], self._parents[row] = key, NO_PARENT
        self._place[rows], self._group[rows] = places, group
        self._children[rows] = [self._awaited.pop(key, 0) for key in keys] if self._awaited else 0
        self._score[rows] = self._clock + 1 + np.arange(count)
        self._clock += count

    def pop(self, key: BlockKey) -> int | None:
        """Take a block out; returns its place, or None if it is not here."""
        row = self._rows.pop(key, None)
        if row is None:
            return None
        if self._children[row]:
            self._awaited[key] = int(self._children[row])
        self._keys[row], self._group[row] = None, -1
        self._free.append(row)
        self._count_child(self._parents[row], -1)
        return int(self._place[row])

    def _count_child(self, parent: BlockKey, change: int) -> None:
        if parent == NO_PARENT:
            return
        row = self._rows.get(parent)
        if row is None:
            children = self._awaited.get(parent, 0) + change
            if children:
                self._awaited[parent] = children
            else:
                del self._awaited[parent]
            return
        self._children[row] += change
        if not self._children[row]:
            for queue in self._queues.values():
                queue.offer(row)

    def load(
        self,
        keys: Sequence[BlockKey],
        places: NDArray[np.int64],
        parents: Sequence[BlockKey],
        groups: NDArray[np.int32],
    ) -> None:
        """Fill an empty index with different keys, the oldest first."""
        assert not self._rows
        self._grow(len(keys))
        self._free.clear()
        self._rows = dict(zip(keys, range(len(keys)), strict=True))
        self._keys[:] = keys
        self._place[:], self._group[:] = places, groups
        self._clock = len(keys)
        self._score[:] = np.arange(self._clock)
        for row, parent in enumerate(parents):
            self._adopt(row, parent)

    def _adopt(self, row: int, parent: BlockKey) -> None:
        parent_row = self._rows.get(parent)
        if parent_row is None:
            self._parents[row] = NO_PARENT if parent == NO_PARENT else parent
            self._count_child(parent, 1)
        else:  # one object for the key and all that name it
            self._parents[row] = self._keys[parent_row] or parent
            self._children[parent_row] += 1

    def _grow(self, rows: int) -> None:
        have = len(self._keys)
        more = max(0, rows - have)
        self._keys += [None] * more
        self._parents += [NO_PARENT] * more
        self._free += range(have + more - 1, have - 1, -1)
        self._place = np.concatenate((self._place, np.zeros(more, np.int64)))
        self._score = np.concatenate((self._score, np.zeros(more, np.int64)))
        self._children = np.concatenate((self._children, np.zeros(more, np.int32)))
        self._group = np.concatenate((self._group, np.full(more, -1, np.int32)))
        self._uses.make_room(have + more)

    # ---- use --------------------------------------------------------------------------

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """A plan uses these blocks of one prefix, first to last, whether they are here or not."""
        if keys:
            self._renew(keys, self._bonus(self._uses.count(keys)))

    def uses(self, key: BlockKey) -> int:
        """How often the block was used of late, about, here or not."""
        return int(self._uses.estimate([key])[0])

    def refresh(self, keys: Sequence[BlockKey]) -> None:
        """They are in use still: as :meth:`touch`, without counting another use."""
        if keys:
            self._renew(keys, self._bonus(self._uses.estimate(keys)))

    def _renew(self, keys: Sequence[BlockKey], bonus: NDArray[np.int64]) -> None:
        rows = np.fromiter((self._rows.get(key, -1) for key in keys), np.int64, len(keys))
        here = rows >= 0
        ages = np.arange(len(keys), 0, -1)  # the first is the youngest
        self._score[rows[here]] = (self._clock + ages + bonus)[here]
        self._clock += len(keys)

    def _bonus(self, uses: NDArray[np.int64]) -> NDArray[np.int64]:
        earlier = np.clip(uses - 1, 0, BONUS_USES_MAX)
        return (BONUS_PART * len(self._rows) * earlier).astype(np.int64)

    # ---- victims ------------------------------------------------------------------------

    def victims(
        self, is_idle: Callable[[BlockKey], bool], groups: Collection[int] | None = None
    ) -> Iterator[BlockKey]:
        """Idle blocks in the order in which they are to go, of some groups or of all.

        The caller may pop what it gets, and nothing else, before it asks for the next. Where
        no leaf is idle, other blocks follow.
        """
        chosen = None if groups is None else frozenset(groups)
        queue = self._queues.get(chosen)
        if queue is None:
            if len(self._queues) >= _QUEUES_MAX:
                self._queues.clear()
            queue = self._queues[chosen] = _VictimQueue(self, chosen)
        yield from queue.victims(is_idle)

    def find_victims(self, groups: frozenset[int] | None, leaves: bool) -> NDArray[np.int64]:
        """Rows of leaves, or of all other blocks, those with the least scores; unordered."""
        mask = (self._group >= 0) & ((self._children == 0) == leaves)
        if groups is not None:
            mask &= np.isin(self._group, list(groups))
        rows = np.flatnonzero(mask)
        count = max(_CANDIDATES_MIN, len(self._rows) // _CANDIDATES_PART)
        if leaves and len(rows) > count:
            rows = rows[np.argpartition(self._score[rows], count)[:count]]
        return rows

    def score_of(self, row: int) -> int:
        return int(self._score[row])

    def leaf_at(self, row: int, groups: frozenset[int] | None) -> BlockKey | None:
        """The block of a row, if it is a leaf of those groups."""
        is_leaf = not self._children[row] and (groups is None or int(self._group[row]) in groups)
        return self._keys[row] if is_leaf else None

    def key_at(self, row: int) -> BlockKey | None:
        return self._keys[row]

    # ---- questions ----------------------------------------------------------------------

    def places(self) -> NDArray[np.int64]:
        """Of all blocks, unordered."""
        return self._place[self._group >= 0]

    def between(self, first: int, last: int) -> list[BlockKey]:
        """The blocks with a place in [first, last)."""
        mask = (self._group >= 0) & (self._place >= first) & (self._place < last)
        return self._keys_of(np.flatnonzero(mask))

    def of_groups(self, groups: Collection[int]) -> list[BlockKey]:
        """The blocks of some groups."""
        return self._keys_of(np.flatnonzero(np.isin(self._group, list(groups))))

    def _keys_of(self, rows: NDArray[np.int64]) -> list[BlockKey]:
        return [key for row in rows.tolist() if (key := self._keys[row]) is not None]


class _VictimQueue:
    """The leaves with the least scores, found many at a time and checked one by one."""

    def __init__(self, index: BlockIndex, groups: frozenset[int] | None) -> None:
        self._index = index
        self._groups = groups
        self._heap: list[tuple[int, int]] = []
        self._score_max = -1
        """Every leaf with a lesser score is in the heap; so is one that becomes a leaf."""

    def offer(self, row: int) -> None:
        """The block of this row has become a leaf."""
        score = self._index.score_of(row)
        if score <= self._score_max:
            heapq.heappush(self._heap, (score, row))

    def victims(self, is_idle: Callable[[BlockKey], bool]) -> Iterator[BlockKey]:
        busy: list[tuple[int, int]] = []
        try:
            yield from self._leaves(is_idle, busy)
            size = -1
            while size != len(self._index):  # whose last child went is a leaf now
                size = len(self._index)
                self._refill()
                busy.clear()
                yield from self._leaves(is_idle, busy)
            others = self._index.find_victims(self._groups, leaves=False)
            for row in sorted(others.tolist(), key=self._index.score_of):
                key = self._index.key_at(row)
                if key is not None and is_idle(key):
                    yield key
        finally:
            for entry in busy:
                heapq.heappush(self._heap, entry)

    def _leaves(
        self, is_idle: Callable[[BlockKey], bool], busy: list[tuple[int, int]]
    ) -> Iterator[BlockKey]:
        """What the caller does not pop goes to ``busy``."""
        index = self._index
        while self._heap:
            entry = heapq.heappop(self._heap)
            score, row = entry
            key = index.leaf_at(row, self._groups)
            if key is None:
                continue
            if index.score_of(row) != score:
                self.offer(row)  # used since
                continue
            busy.append(entry)
            if is_idle(key):
                yield key
                if key not in index:
                    busy.pop()

    def _refill(self) -> None:
        rows = self._index.find_victims(self._groups, leaves=True)
        scores = [self._index.score_of(row) for row in rows.tolist()]
        self._heap = list(zip(scores, rows.tolist(), strict=True))
        heapq.heapify(self._heap)
        self._score_max = max(scores, default=-1)
