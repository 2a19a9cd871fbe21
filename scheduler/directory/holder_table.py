"""Of each block, the number of its set of holders: arrays beside a :class:`KeyTable`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.block import BlockKey
from scheduler.directory.holder_sets import NOBODY, HolderSets, SetIds
from scheduler.directory.key_table import Fingerprints, KeyTable, Slots, fingerprints

_EVICT_DIVISOR = 16
"""The oldest 1/16 go at once: to find them is a pass over all blocks."""
_CHANGES_AT_ONCE = 1 << 16
_ENTRIES_MIN = 1 << 12
_SETS_MIN = 1 << 16
"""Fewer sets than these are not looked through for unused ones."""


class HolderTable:
    """22 bytes a block when full (fingerprint 8, set 4, age 4, at a load of 0.73).

    Bounded: beyond ``entries_max`` the blocks announced longest ago are forgotten.
    """

    def __init__(self, entries_max: int) -> None:
        if entries_max < 1:
            raise ValueError(f"entries_max must be at least 1, got {entries_max}")
        self._entries_max = entries_max
        self.added_max = max(1, min(entries_max // _EVICT_DIVISOR, _CHANGES_AT_ONCE))
        """New entries between two calls of :meth:`enforce_bounds`, at most."""
        self.sets = HolderSets()
        self.dropped_total = 0
        """Blocks forgotten because of the bound."""
        self._table = KeyTable(self._capacity(0))
        self._set_ids: SetIds = np.zeros(self._table.slots, np.int32)
        """By slot. A slot whose set is empty is no entry: only its fingerprint is left."""
        self._announced: NDArray[np.uint32] = np.zeros(self._table.slots, np.uint32)
        """By slot, a count of new entries: their order. After 4 billion it begins anew, and the
        next blocks that the bound drops may be younger ones."""
        self._announced_next = 0
        self._entries = 0
        self._sets_max = _SETS_MIN
        self._found: tuple[Sequence[BlockKey], Slots] = ((), np.empty(0, np.intp))

    def __len__(self) -> int:
        return self._entries

    @property
    def memory_bytes(self) -> int:
        """Of the arrays that grow with the number of blocks."""
        return self._table.memory_bytes + self._set_ids.nbytes + self._announced.nbytes

    # ---- reading ----------------------------------------------------------------------

    def find(self, keys: Sequence[BlockKey]) -> Slots:
        """Slot of each block, -1 where it is not in the table; good until the next change."""
        slots = self._table.find(fingerprints(keys))
        self._found = keys, slots
        return slots

    def found(self, keys: Sequence[BlockKey]) -> Slots:
        """The same, without a search for the list that was found last: a plan is made of one
        look-up."""
        last, slots = self._found
        return slots if keys is last else self._table.find(fingerprints(keys))

    def set_ids(self, slots: Slots) -> SetIds:
        """Numbers of the sets in these slots; ``NOBODY`` for -1."""
        return np.where(slots < 0, NOBODY, self._set_ids[slots])

    # ---- changing ---------------------------------------------------------------------

    def replace(self, slots: Slots, ids: SetIds) -> None:
        """Other sets for these slots. What is an entry, and only that, stays one."""
        self._set_ids[slots[slots >= 0]] = ids[slots >= 0]

    def change(self, keys: Sequence[BlockKey], bits: int, held: bool) -> None:
        """These blocks have, or no longer have, these holders."""
        prints = fingerprints(keys)
        self._put(self._add(prints) if held else self._known(prints), bits, held)

    def change_entries(self, keys: Sequence[BlockKey], bits: int, held: bool) -> None:
        """The same, only for those that somebody has already."""
        slots = self._known(fingerprints(keys))
        self._put(slots[self._set_ids[slots] != NOBODY], bits, held)

    def clear(self, bits: int, for_good: bool = False) -> None:
        """No block has these holders. One pass over all of them, some 10 ms a million; two where
        the sets that have them are to be forgotten, too."""
        self._set_ids = self.sets.without(bits)[self._set_ids]
        if for_good:
            self._set_ids = _of_used_sets(self.sets, self._set_ids)
        self._entries = int(np.count_nonzero(self._set_ids))

    def enforce_bounds(self) -> None:
        """Forget the oldest blocks, and sets that no block has."""
        if self._entries > self._entries_max:
            dropped = self._entries - self._entries_max + self._entries_max // _EVICT_DIVISOR
            entries = np.flatnonzero(self._set_ids)
            age = np.uint32(self._announced_next & 0xFFFFFFFF) - self._announced[entries]
            oldest = entries[np.argpartition(age, len(age) - dropped)[len(age) - dropped :]]
            self._set_ids[oldest] = NOBODY
            self._entries -= dropped
            self.dropped_total += dropped
        if len(self.sets) > self._sets_max:
            self._set_ids = _of_used_sets(self.sets, self._set_ids)
            self._sets_max = max(_SETS_MIN, 2 * len(self.sets))

    # ---- inside -----------------------------------------------------------------------

    def _known(self, prints: Fingerprints) -> Slots:
        slots = self._table.find(prints)
        return slots[slots >= 0]

    def _add(self, prints: Fingerprints) -> Slots:
        """Slots of these; of those that are not there, new ones."""
        slots = self._table.find(prints)
        absent = np.flatnonzero(slots < 0)
        if self._table.taken + len(absent) > self._table.capacity:
            self._pack(len(absent))
            slots = self._table.find(prints)
            absent = np.flatnonzero(slots < 0)
        slots[absent] = self._table.insert(prints[absent])
        return slots

    def _put(self, slots: Slots, bits: int, held: bool) -> None:
        """Change the sets of these entries, and with them which slots are entries."""
        before = self._set_ids[slots]
        after = self.sets.changed(before, bits, held)
        self._set_ids[slots] = after
        new = slots[before == NOBODY] if held else slots[:0]
        count = self._announced_next + np.arange(len(new))
        self._announced[new] = count.astype(np.uint32)
        self._announced_next += len(new)
        self._entries += int(np.count_nonzero(after)) - int(np.count_nonzero(before))

    def _capacity(self, entries: int) -> int:
        return min(max(2 * entries, _ENTRIES_MIN), self._entries_max + self.added_max)

    def _pack(self, more: int) -> None:
        """Leave out the slots that are no entries, and make room for so many more."""
        self._found = (), np.empty(0, np.intp)
        kept = np.flatnonzero(self._set_ids)
        self._table, slots = self._table.resized(kept, self._capacity(len(kept) + more))
        for name in ("_set_ids", "_announced"):
            column = getattr(self, name)
            moved = np.zeros(self._table.slots, column.dtype)
            moved[slots] = column[kept]
            setattr(self, name, moved)


def _of_used_sets(sets: HolderSets, ids: SetIds) -> SetIds:
    """The numbers that these sets get when those that no block has are forgotten."""
    used = np.flatnonzero(np.bincount(ids, minlength=len(sets)))
    return np.asarray(sets.keep(used.astype(np.int32))[ids])
