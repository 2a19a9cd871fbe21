"""Parents and children among the blocks of an index."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from common.block import NO_PARENT, BlockKey
from storage.index.rows import Rows


class Lineage:
    """Counts the children of each block that are here. ``on_leaf`` is told the row of a block
    whose last child has gone."""

    def __init__(self, rows: Rows, on_leaf: Callable[[int], None]) -> None:
        self._rows = rows
        self._on_leaf = on_leaf
        self._awaited: dict[BlockKey, int] = {}
        """Parents that are not here, with the number of their children that are."""

    def add(self, row: int, key: BlockKey, parent: BlockKey) -> None:
        """A block has come."""
        self._rows.parents[row] = parent
        self._rows.children[row] = self._awaited.pop(key, 0)
        self._count_child(parent, 1)

    def add_orphans(self, rows: NDArray[np.int64], keys: Sequence[BlockKey]) -> None:
        """Blocks of unknown parents have come."""
        awaited = self._awaited
        self._rows.children[rows] = [awaited.pop(key, 0) for key in keys] if awaited else 0

    def load(self, parents: Sequence[BlockKey]) -> None:
        """Block i, in row i, has ``parents[i]``."""
        rows = self._rows
        for row, parent in enumerate(parents):
            parent_row = rows.of.get(parent)
            if parent_row is None:
                rows.parents[row] = NO_PARENT if parent == NO_PARENT else parent
                self._count_child(parent, 1)
            else:  # one object for the key and all that name it
                rows.parents[row] = rows.keys[parent_row] or parent
                rows.children[parent_row] += 1

    def pop(self, row: int, key: BlockKey) -> None:
        """The block of this row has gone."""
        children = int(self._rows.children[row])
        if children:
            self._awaited[key] = children
        self._count_child(self._rows.parents[row], -1)

    def _count_child(self, parent: BlockKey, change: int) -> None:
        if parent == NO_PARENT:
            return
        row = self._rows.of.get(parent)
        if row is None:
            children = self._awaited.get(parent, 0) + change
            if children:
                self._awaited[parent] = children
            else:
                del self._awaited[parent]
            return
        self._rows.children[row] += change
        if not self._rows.children[row]:
            self._on_leaf(row)
