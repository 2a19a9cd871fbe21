"""A set of block keys in little memory, searched a thousand keys at a time.

Open addressing over numpy arrays. Of a key, which is a sha256, 64 bits are kept as its
*fingerprint*. Two of 10 million keys share one with a probability of 3e-6; then one is taken
for the other, which costs a recomputation: agents check whole keys.

Slots come in buckets of eight, a cache line of fingerprints; what finds its bucket full goes
to the next. A slot is taken for ever, until :meth:`KeyTable.resized` packs anew those in use.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.block import KEY_BYTES, BlockKey

Fingerprints = NDArray[np.uint64]
Slots = NDArray[np.intp]

BUCKET_SLOTS = 8
LOAD_MAX = 0.78
"""Taken slots of all: beyond, searches get long."""
SEARCHED_AT_ONCE = 4
"""Buckets that are looked at together for what is not in its own one: one in ten."""
PACKED_AT_ONCE = 1 << 16
"""Bounds the temporary arrays of a resize."""


def fingerprints(keys: Sequence[BlockKey]) -> Fingerprints:
    """64 bits of each key; never 0, which marks a free slot."""
    words = np.frombuffer(b"".join(keys), "<u8").reshape(-1, KEY_BYTES // 8)
    return np.asarray(np.maximum(words[:, -1], 1))


class KeyTable:
    """Fingerprint -> slot: the index of an entry in arrays of the caller, one a column.

    ``capacity``: entries that it holds before it must be resized.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.taken = 0
        buckets = int(capacity / LOAD_MAX) // BUCKET_SLOTS + 2
        self._buckets: Fingerprints = np.zeros((buckets, BUCKET_SLOTS), np.uint64)
        self._slots = self._buckets.reshape(-1)

    @property
    def slots(self) -> int:
        """Length of the caller's columns."""
        return len(self._slots)

    @property
    def memory_bytes(self) -> int:
        return self._slots.nbytes

    def find(self, wanted: Fingerprints) -> Slots:
        """Slot of each; -1 where it is not in the table."""
        found = np.full(len(wanted), -1, np.intp)
        first, pending, at_once = self._home(wanted), np.arange(len(wanted)), 1
        while len(pending):
            buckets = (first[:, None] + np.arange(at_once)) % len(self._buckets)
            rows = self._buckets[buckets].reshape(len(pending), -1)
            of, column = np.divmod(np.flatnonzero(rows == wanted[pending, None]), rows.shape[1])
            bucket = buckets[of, column // BUCKET_SLOTS]
            found[pending[of]] = bucket * BUCKET_SLOTS + column % BUCKET_SLOTS
            onward = rows[:, BUCKET_SLOTS - 1 :: BUCKET_SLOTS].all(axis=1)  # all are full
            onward[of] = False
            pending, first = pending[onward], buckets[onward, -1] + 1
            at_once = SEARCHED_AT_ONCE
        return found

    def insert(self, absent: Fingerprints) -> Slots:
        """Take a slot for each of these, which are distinct and not in the table.

        Raises ``OverflowError`` beyond ``capacity``.
        """
        if self.taken + len(absent) > self.capacity:
            raise OverflowError(f"more than {self.capacity} entries")
        self.taken += len(absent)
        slots = np.empty(len(absent), np.intp)
        bucket, pending = self._home(absent), np.arange(len(absent))
        while len(pending):
            order = np.argsort(bucket, kind="stable")
            bucket, pending = bucket[order], pending[order]
            # A bucket fills from the left: those that want it queue behind what is there.
            place = np.arange(len(bucket))
            is_first = np.diff(bucket, prepend=-1) != 0
            queue = place - np.maximum.accumulate(np.where(is_first, place, 0))
            column = np.count_nonzero(self._buckets[bucket], axis=1) + queue
            fits = column < BUCKET_SLOTS
            taken = bucket[fits] * BUCKET_SLOTS + column[fits]
            self._slots[taken] = absent[pending[fits]]
            slots[pending[fits]] = taken
            pending, bucket = pending[~fits], self._next(bucket[~fits])
        return slots

    def resized(self, kept: Slots, capacity: int) -> tuple[KeyTable, Slots]:
        """A table of another capacity with the entries of these slots, and their new slots."""
        table = KeyTable(capacity)
        moved = np.empty(len(kept), np.intp)
        for first in range(0, len(kept), PACKED_AT_ONCE):
            part = slice(first, first + PACKED_AT_ONCE)
            moved[part] = table.insert(self._slots[kept[part]])
        return table, moved

    def _home(self, wanted: Fingerprints) -> Slots:
        """The upper 32 bits, scaled: keys keep their order, so packing runs through memory."""
        scaled = (wanted >> np.uint64(32)) * np.uint64(len(self._buckets)) >> np.uint64(32)
        return scaled.astype(np.intp)

    def _next(self, bucket: Slots) -> Slots:
        return np.asarray((bucket + 1) % len(self._buckets))
