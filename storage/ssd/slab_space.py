"""The slabs of one disk: which there are, their free slots, and how far they may grow."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from storage.ssd.slab import Slab, slots_within

logger = logging.getLogger(__name__)

SLABS_PER_DEVICE = 16
"""Each slab that a group of writes touches is a sync; each is what is given back at once."""
SPARE_PART = 0.01
"""Of a disk's free space, for the file system's own needs."""


class SlabSpace:
    """Slabs in a folder, up to ``capacity_bytes`` or what the disk has room for, and so that
    ``min_free_bytes`` of it stay free. Belongs to the tier's owner. Raises OSError at start."""

    def __init__(
        self, folder: Path, capacity_bytes: int, min_free_bytes: int, direct_flag: int
    ) -> None:
        self.slabs: dict[int, Slab] = {}
        self._folder = folder
        self._direct_flag = direct_flag
        self._min_free_bytes = min_free_bytes
        self._capacity_bytes = capacity_bytes
        self._with_room: defaultdict[int, list[Slab]] = defaultdict(list)
        """Slabs with a free slot, by the size of their slots."""
        for path in sorted(folder.glob("*.slab")):
            slab = Slab.found(path, direct_flag)
            if slab is not None:
                self.slabs[slab.number] = slab
        self._count_held()
        if self.capacity_bytes < capacity_bytes:
            logger.warning(
                "SSD directory %s has room for %d bytes of its capacity of %d bytes",
                folder,
                self.capacity_bytes,
                capacity_bytes,
            )
        self._slab_bytes = self.capacity_bytes // SLABS_PER_DEVICE
        self._next_number = max(self.slabs, default=-1) + 1

    # ---- room -----------------------------------------------------------------------

    @property
    def capacity_bytes(self) -> int:
        """What it may come to hold, as the disk is now."""
        held_bytes = self._held_bytes
        return min(self._capacity_bytes, held_bytes + max(0, self._free_bytes()))

    @property
    def is_too_large(self) -> bool:
        """Beyond the capacity, or on a disk that others have filled: a slab should go."""
        return self._held_bytes > self._capacity_bytes or self.lacks_space()

    def lacks_space(self) -> bool:
        """Others have filled the disk: a slab should go."""
        return self._free_bytes() < 0

    def _count_held(self) -> None:
        """After slabs came or went."""
        self._held_bytes = sum(slab.nbytes for slab in self.slabs.values())

    def _free_bytes(self) -> int:
        """For new slabs; negative where not even the minimum is free."""
        try:
            status = os.statvfs(self._folder)
        except OSError:
            return 0  # whoever reads or writes there will learn what is wrong
        available_bytes = status.f_bavail * status.f_frsize
        return int(available_bytes * (1 - SPARE_PART)) - self._min_free_bytes

    # ---- slots ----------------------------------------------------------------------

    def take_slot(self, slot_bytes: int) -> tuple[Slab, int] | None:
        """A free slot, if need be of a new slab; None: there is no room."""
        with_room = self._with_room[slot_bytes]
        if not with_room and not self._add_slab(slot_bytes):
            return None
        slab = with_room[-1]
        slot = slab.free.pop()
        if not slab.free:
            with_room.pop()
        return slab, slot

    def _add_slab(self, slot_bytes: int) -> bool:
        if self._capacity_bytes - self._held_bytes < slot_bytes:
            return False  # as for every write into a full tier: the disk need not be asked
        num_slots = min(
            (self._capacity_bytes - self._held_bytes) // slot_bytes,
            max(1, self._slab_bytes // slot_bytes),
            slots_within(self._free_bytes(), slot_bytes),
        )
        if num_slots <= 0:
            return False
        slab = Slab(self._folder, self._next_number, slot_bytes, num_slots, self._direct_flag)
        self._next_number += 1
        self.slabs[slab.number] = slab
        self._count_held()
        self._with_room[slot_bytes].append(slab)
        return True

    def adopt(self, slab: Slab, used: NDArray[np.int64]) -> None:
        """Tell which slots of a slab that was found hold blocks."""
        slab.free = np.setdiff1d(np.arange(slab.num_slots), used)[::-1].tolist()
        if slab.free:
            self._with_room[slab.slot_bytes].append(slab)

    def give_back(self, slab: Slab, slot: int) -> None:
        """Nothing lies in the slot any more."""
        if slab.number not in self.slabs:
            return
        if not slab.free:
            self._with_room[slab.slot_bytes].append(slab)
        slab.free.append(slot)

    # ---- slabs that go ----------------------------------------------------------------

    def discard(self, slab: Slab) -> None:
        """Delete a slab; the caller knows that nothing lies in it, and that it is idle."""
        self._forget(slab)
        try:
            slab.file.delete()
        except OSError as error:
            logger.warning("SSD directory %s: a slab stays: %s", self._folder, error)

    def delete_unused(self, number: int) -> None:
        """At a start: a slab of which no slot was adopted. Raises OSError."""
        self.slabs.pop(number).file.delete()
        self._count_held()

    def _forget(self, slab: Slab) -> None:
        del self.slabs[slab.number]
        self._count_held()
        if slab.free:
            self._with_room[slab.slot_bytes].remove(slab)

    def stop_growing(self, slab: Slab) -> None:
        """The disk has no room for the new slab: what it has must do."""
        if slab.number not in self.slabs:
            return
        self._forget(slab)
        self._capacity_bytes = self._held_bytes
        logger.warning(
            "SSD directory %s is full: its capacity is now %d bytes",
            self._folder,
            self._capacity_bytes,
        )

    def close(self) -> None:
        """No call may be running. Raises OSError."""
        for slab in self.slabs.values():
            slab.file.close()
