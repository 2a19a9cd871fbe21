"""Which blocks a tier holds, where they lie, and which of them go first.

Eviction takes leaves first: a block is of no use without its parent, so a parent stays
while a child is here. Among leaves it takes the one with the least *score*: when the block
was last used, counted in uses, plus a bonus for earlier uses; what has *retired* goes before
all others. docs/storage.md has the comparison with LRU and Belady's rule.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from common.block import NO_PARENT, BlockKey
from storage.index.eviction import EvictionOrder, IsIdle
from storage.index.lineage import Lineage
from storage.index.rows import Rows
from storage.index.scores import Scores
from storage.index.use_counts import UseCounts


class BlockIndex:
    """Key -> place, with the order of eviction. About 250 bytes a block.

    ``group`` is a small number of the caller's, by which victims can be chosen.
    """

    def __init__(self) -> None:
        uses = UseCounts()
        self._rows = Rows(uses.make_room)
        self._scores = Scores(self._rows, uses)
        self._order = EvictionOrder(self._rows)
        self._lineage = Lineage(self._rows, self._order.offer)
        self._row_of = self._rows.of

    # ---- a mapping --------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, key: object) -> bool:
        return key in self._row_of

    def __iter__(self) -> Iterator[BlockKey]:
        return iter(self._row_of)

    def get(self, key: BlockKey) -> int | None:
        """The block's place; None if it is not here."""
        row = self._row_of.get(key)
        return None if row is None else int(self._rows.places[row])

    def group(self, key: BlockKey) -> int:
        """Raises KeyError."""
        return int(self._rows.groups[self._row_of[key]])

    def add(self, key: BlockKey, place: int, parent: BlockKey = NO_PARENT, group: int = 0) -> None:
        """A block that is not here yet; it counts as used now."""
        row = self._rows.add(key, place, group)
        self._scores.add(row, key)
        self._lineage.add(row, key, parent)

    def add_many(self, keys: Sequence[BlockKey], places: NDArray[np.int64], group: int) -> None:
        """Different blocks that are not here yet, of unknown parents, all at once: each counts
        as used now, and no use is counted. For indexes that choose no victims by use."""
        rows = self._rows.add_many(keys, places, group)
        self._scores.add_many(rows)
        self._lineage.add_orphans(rows, keys)

    def pop(self, key: BlockKey) -> int | None:
        """Take a block out; returns its place, or None if it is not here."""
        row = self._rows.pop(key)
        if row is None:
            return None
        self._lineage.pop(row, key)
        return int(self._rows.places[row])

    def load(
        self,
        keys: Sequence[BlockKey],
        places: NDArray[np.int64],
        parents: Sequence[BlockKey],
        groups: NDArray[np.int32],
    ) -> None:
        """Fill an empty index with different keys, the oldest first."""
        self._rows.load(keys, places, groups)
        self._scores.load()
        self._lineage.load(parents)

    # ---- use and victims ----------------------------------------------------------------

    def touch(self, keys: Sequence[BlockKey], replaced: Sequence[BlockKey] = ()) -> None:
        """A plan uses these blocks of one prefix, first to last, whether they are here or not.

        For those ``replaced`` something newer stands: they retire, which is to go before all
        others, in the order of their ages. Not those that several plans have used; and one that
        is used again is as any other."""
        self._scores.touch(keys)
        for row in self._scores.retire(replaced).tolist():
            self._order.offer(row)

    def refresh(self, keys: Sequence[BlockKey]) -> None:
        """They are in use still: as :meth:`touch`, without counting another use, and but for what
        has retired meanwhile."""
        self._scores.refresh(keys)

    def uses(self, key: BlockKey) -> int:
        """How often the block was used of late, about, here or not."""
        return self._scores.uses(key)

    def victims(self, is_idle: IsIdle, groups: Collection[int] | None = None) -> Iterator[BlockKey]:
        """Idle blocks in the order in which they are to go, of some groups or of all.

        The caller may pop what it gets, and nothing else, before it asks for the next. Where
        no leaf is idle, other blocks follow.
        """
        return self._order.victims(is_idle, groups)

    # ---- questions ----------------------------------------------------------------------

    def between(self, first: int, last: int) -> list[BlockKey]:
        """The blocks with a place in [first, last)."""
        rows = self._rows
        return rows.keys_of((rows.groups >= 0) & (rows.places >= first) & (rows.places < last))

    def of_groups(self, groups: Collection[int]) -> list[BlockKey]:
        """The blocks of some groups."""
        return self._rows.keys_of(np.isin(self._rows.groups, list(groups)))
