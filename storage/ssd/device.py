"""One disk of the SSD tier: its slabs, threads and health."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.block import BlockOwner
from storage.block_format import decode_owner, encode_owner
from storage.ssd.folder import DirectoryUnusable, SsdFolder
from storage.ssd.notes import FolderNotes
from storage.ssd.slab import Slab, Written, slots_within
from storage.ssd.slab_records import apply_drops
from storage.ssd.slab_table import owner_number
from storage.tiers.io_threads import CLOSE_TIMEOUT_S, IoThreads
from storage.tiers.operation import Operation

logger = logging.getLogger(__name__)

SLABS_PER_DEVICE = 16
"""Each slab that a group of writes touches is a sync; each is what is given back at once."""
SYNC_THREADS = 8
"""Slabs that are synced at once."""
SCAN_THREADS = 16
"""Slabs that are looked through at once, at a start."""
ERRORS_MAX = 8
"""I/O errors in a row after which a disk is taken out."""
FATAL_ERRORS = {errno.EROFS, errno.ENODEV, errno.ENXIO, errno.ESHUTDOWN, errno.ESTALE}
SPARE_PART = 0.01
"""Of a disk's free space, for the file system's own needs."""


class DeviceOptions(NamedTuple):
    """What every disk of a tier gets."""

    capacity_bytes: int
    min_free_bytes: int
    """Stay free on the disk, whoever else fills it."""
    threads: int
    """Readers; half as many writers."""


class SsdDevice:
    """Slabs in one folder, up to the capacity or what the disk has room for. Where less than
    the minimum is free nothing grows, and the owner is told to give a slab back.

    Slots are given out, and health is judged, by the owner's thread. ``hand_back`` is called
    from an I/O thread with each write that is durable or failed. Raises
    :class:`DirectoryLocked` or :class:`DirectoryUnusable`.
    """

    def __init__(
        self, folder: Path, options: DeviceOptions, hand_back: Callable[[Operation], None]
    ) -> None:
        self.path = folder
        self.is_failed = False
        self.slabs: dict[int, Slab] = {}
        self._held_bytes = 0
        self._with_room: defaultdict[int, list[Slab]] = defaultdict(list)
        """Slabs with a free slot, by the size of their slots."""
        self._errors = 0
        self._owner_numbers: dict[BlockOwner, int] = {}
        """Owners that the folder has noted, with their numbers in tables."""
        self._owners_lock = threading.Lock()
        self._hand_back = hand_back
        self._min_free_bytes = options.min_free_bytes
        self._capacity_bytes = options.capacity_bytes
        try:
            self._folder = SsdFolder(folder)
            try:
                self._find_slabs()
            except OSError:
                self._folder.unlock()
                raise
        except OSError as error:
            raise DirectoryUnusable(folder, error.strerror or str(error)) from error
        self._slab_bytes = self.capacity_bytes // SLABS_PER_DEVICE
        self._next_number = max(self.slabs, default=-1) + 1
        # writes sync, and so take long: with threads of their own they do not delay reads
        self.readers = IoThreads(f"read {folder}", options.threads)
        self.writers = IoThreads(f"write {folder}", max(1, options.threads // 2))
        self._syncers = IoThreads(f"sync {folder}", SYNC_THREADS)

    # ---- start and end --------------------------------------------------------------

    def _find_slabs(self) -> None:
        for path in sorted(self.path.glob("*.slab")):
            slab = Slab.found(path, self._folder.direct_flag)
            if slab is not None:
                self.slabs[slab.number] = slab
        self._count_held()
        if self.capacity_bytes < self._capacity_bytes:
            logger.warning(
                "SSD directory %s has room for %d bytes of its capacity of %d bytes",
                *(self.path, self.capacity_bytes, self._capacity_bytes),
            )

    def restore(self) -> dict[int, NDArray[np.void]]:
        """What an earlier process left: the records of each slab, without dropped blocks.

        Slabs beyond the capacity go, those with the oldest blocks first. Raises
        :class:`DirectoryUnusable`, closed.
        """
        try:
            records = self._read_records()
        except OSError as error:
            self.close()
            raise DirectoryUnusable(self.path, error.strerror or str(error)) from error
        for number in sorted(records, key=lambda n: records[n]["sequence"].max()):
            if self._held_bytes <= self._capacity_bytes and not self.lacks_space():
                break
            del records[number]
            self.slabs.pop(number).delete()
            self._count_held()
        apply_drops(records.values(), self._folder.notes.drops(), self._owner_numbers)
        return records

    def _read_records(self) -> dict[int, NDArray[np.void]]:
        self._know(self._folder.notes.owners())
        known = set(self._owner_numbers.values())
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            found = list(pool.map(lambda slab: slab.records(known), self.slabs.values()))
        self._note_owners({decode_owner(raw) for _, owners in found for raw in owners})
        return dict(zip(self.slabs, (records for records, _ in found), strict=True))

    def close(self) -> None:
        """End the threads."""
        threads = (self.readers, self.writers, self._syncers)
        if not all([each.close(CLOSE_TIMEOUT_S) for each in threads]):
            return  # a call hangs in the disk: its file must not be closed under it
        try:
            for slab in self.slabs.values():
                slab.close()
        except OSError as error:
            logger.warning("SSD directory %s was not closed cleanly: %s", self.path, error)
        self._folder.unlock()

    # ---- owners ---------------------------------------------------------------------

    @property
    def notes(self) -> FolderNotes:
        """What the folder says of owners and drops."""
        return self._folder.notes

    @property
    def owners(self) -> dict[int, BlockOwner]:
        """By the numbers that records have."""
        return {number: owner for owner, number in self._owner_numbers.items()}

    def _know(self, owners: Iterable[BlockOwner]) -> None:
        self._owner_numbers |= {owner: owner_number(encode_owner(owner)) for owner in owners}

    def _note_owners(self, owners: set[BlockOwner]) -> None:
        """In any thread: owners are noted before a table names them."""
        with self._owners_lock:
            if new := owners - self._owner_numbers.keys():
                self._folder.notes.add_owners(new)
                self._know(new)

    # ---- room -----------------------------------------------------------------------

    @property
    def capacity_bytes(self) -> int:
        """What it may come to hold, as the disk is now."""
        held_bytes = self._held_bytes
        return min(self._capacity_bytes, held_bytes + max(0, self._free_bytes()))

    def lacks_space(self) -> bool:
        """Others have filled the disk: a slab should go."""
        return self._free_bytes() < 0

    def _count_held(self) -> None:
        """After slabs came or went."""
        self._held_bytes = sum(slab.nbytes for slab in self.slabs.values())

    def _free_bytes(self) -> int:
        """For new slabs; negative where not even the minimum is free."""
        try:
            status = os.statvfs(self.path)
        except OSError:
            return 0  # whoever reads or writes there will learn what is wrong
        available_bytes = status.f_bavail * status.f_frsize
        return int(available_bytes * (1 - SPARE_PART)) - self._min_free_bytes

    # ---- slots ----------------------------------------------------------------------

    def take_slot(self, slot_bytes: int) -> tuple[Slab, int] | None:
        """A free slot, if need be of a new slab; None: the device is full, or failed."""
        if self.is_failed:
            return None
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
        slab = Slab(self.path, self._next_number, slot_bytes, num_slots, self._folder.direct_flag)
        self._next_number += 1
        self.slabs[slab.number] = slab
        self._count_held()
        self._with_room[slot_bytes].append(slab)
        return True

    def adopt(self, slab: Slab, used: NDArray[np.int64]) -> None:
        """Tell which slots of a slab of :meth:`restore` hold blocks."""
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

    def discard(self, slab: Slab) -> None:
        """Delete a slab; the caller knows that nothing lies in it, and that it is idle."""
        self._forget(slab)
        try:
            slab.delete()
        except OSError as error:
            logger.warning("SSD directory %s: a slab stays: %s", self.path, error)

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
            *(self.path, self._capacity_bytes),
        )

    # ---- health ---------------------------------------------------------------------

    def note_result(self, error: OSError | None) -> bool:
        """Count I/O errors in a row; True if the device is to be taken out now."""
        self._errors = self._errors + 1 if error is not None else 0
        is_fatal = error is not None and error.errno in FATAL_ERRORS
        if self.is_failed or not (is_fatal or self._errors >= ERRORS_MAX):
            return False
        self.fail(error)
        return True

    def fail(self, error: OSError | None) -> None:
        """From now on nothing is given out here; the owner has to let go of its blocks."""
        self.is_failed = True
        logger.error(
            "SSD directory %s is taken out, and with it all blocks in it: %s", self.path, error
        )

    # ---- group sync, in I/O threads ---------------------------------------------------

    def sync_later(self, written: Written) -> None:
        """Sync the block together with all that are written to its slab until then."""
        slab = written.slab
        slab.unsynced.append(written)
        if slab.sync_turn.acquire(blocking=False):
            self._syncers.submit(lambda: self._sync_slab(slab))

    def _sync_slab(self, slab: Slab) -> None:
        """With the slab's turn. Slabs are synced side by side: a disk makes one flush of many."""
        while True:
            while group := [slab.unsynced.popleft() for _ in range(len(slab.unsynced))]:
                self._sync_group(slab, group)
            slab.sync_turn.release()
            # what came before the release left its sync to this thread
            if not slab.unsynced or not slab.sync_turn.acquire(blocking=False):
                return

    def _sync_group(self, slab: Slab, group: list[Written]) -> None:
        error = self._sync(slab, group)
        now = time.monotonic()
        for operation in (written.operation for written in group):
            operation.error = error
            operation.seconds = now - (operation.started_s or now)
            self._hand_back(operation)

    def _sync(self, slab: Slab, group: list[Written]) -> Exception | None:
        """Make the blocks durable, and with them what the table says of them."""
        try:
            self._note_owners({written.operation.label.owner for written in group})
            numbers = self._owner_numbers
            slab.record((each, numbers[each.operation.label.owner]) for each in group)
            slab.sync()
        except Exception as error:  # it ends this group, and not the slab's turn to sync
            return error
        return None
