"""The columns of an index: a row a block, so that searches over all blocks are vectorised."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from common.block import NO_PARENT, BlockKey


class Rows:
    """``of[key]`` is the row of a block that is here. Columns are replaced as they grow, and so
    are to be taken from here each time; ``on_growth`` is told how many rows there are then."""

    def __init__(self, on_growth: Callable[[int], None]) -> None:
        self.of: dict[BlockKey, int] = {}
        self.keys: list[BlockKey | None] = []
        self.parents: list[BlockKey] = []
        self.places = np.zeros(0, np.int64)
        self.scores = np.zeros(0, np.int64)
        """Those with the least go first."""
        self.children = np.zeros(0, np.int32)
        """That are here."""
        self.groups = np.full(0, -1, np.int32)
        """-1: the row is free."""
        self._free: list[int] = []
        self._on_growth = on_growth

    def add(self, key: BlockKey, place: int, group: int) -> int:
        """Returns the block's row."""
        if not self._free:
            self._grow(max(64, 2 * len(self.keys)))
        row = self.of[key] = self._free.pop()
        self.keys[row] = key
        self.places[row], self.groups[row] = place, group
        return row

    def add_many(
        self, keys: Sequence[BlockKey], places: NDArray[np.int64], group: int
    ) -> NDArray[np.int64]:
        """Returns the blocks' rows; shape (len(keys),)."""
        count = len(keys)
        if len(self._free) < count:
            self._grow(max(len(self.keys) + count, 2 * len(self.keys)))
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        self.of.update(zip(keys, taken, strict=True))
        for row, key in zip(taken, keys, strict=True):
            self.keys[row], self.parents[row] = key, NO_PARENT
        rows = np.array(taken, np.int64)
        self.places[rows], self.groups[rows] = places, group
        return rows

    def load(
        self, keys: Sequence[BlockKey], places: NDArray[np.int64], groups: NDArray[np.int32]
    ) -> None:
        """Fill them while they are empty: block i gets row i."""
        assert not self.of
        self._grow(len(keys))
        self._free.clear()
        self.of.update(zip(keys, range(len(keys)), strict=True))
        self.keys[:] = keys
        self.places[:], self.groups[:] = places, groups

    def pop(self, key: BlockKey) -> int | None:
        """Frees the block's row, and returns it; None if it has none."""
        row = self.of.pop(key, None)
        if row is not None:
            self.keys[row], self.groups[row] = None, -1
            self._free.append(row)
        return row

    def keys_of(self, mask: NDArray[np.bool_]) -> list[BlockKey]:
        """The blocks of these rows, but for free ones."""
        rows = np.flatnonzero(mask).tolist()
        return [key for row in rows if (key := self.keys[row]) is not None]

    def _grow(self, rows: int) -> None:
        have = len(self.keys)
        more = max(0, rows - have)
        self.keys += [None] * more
        self.parents += [NO_PARENT] * more
        self._free += range(have + more - 1, have - 1, -1)
        self.places = np.concatenate((self.places, np.zeros(more, np.int64)))
        self.scores = np.concatenate((self.scores, np.zeros(more, np.int64)))
        self.children = np.concatenate((self.children, np.zeros(more, np.int32)))
        self.groups = np.concatenate((self.groups, np.full(more, -1, np.int32)))
        self._on_growth(have + more)
