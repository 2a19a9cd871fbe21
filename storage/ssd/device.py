"""One disk of the SSD tier: its folder, slabs, threads and health."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from storage.block_format import decode_owner
from storage.ssd.folder import FATAL_ERRORS, SsdFolder, unusable
from storage.ssd.group_sync import GroupSync
from storage.ssd.notes import FolderNotes
from storage.ssd.owner_numbers import OwnerNumbers
from storage.ssd.slab import Slab
from storage.ssd.slab_records import Records, apply_drops
from storage.ssd.slab_space import SlabSpace
from storage.tiers.io_threads import CLOSE_TIMEOUT_S, IoThreads
from storage.tiers.operation import Operation

logger = logging.getLogger(__name__)

SCAN_THREADS = 16
"""Slabs that are looked through at once, at a start."""
ERRORS_MAX = 8
"""I/O errors in a row after which a disk is taken out."""


class DeviceOptions(NamedTuple):
    """What every disk of a tier gets."""

    capacity_bytes: int
    min_free_bytes: int
    """Stay free on the disk, whoever else fills it."""
    threads: int
    """Readers; half as many writers."""


class SsdDevice:
    """A folder that this process owns. Slots are given out, and health is judged, by the tier's
    owner. ``hand_back`` is called from an I/O thread with each write that is durable or failed.

    Raises :class:`DirectoryLocked` or :class:`DirectoryUnusable`.
    """

    def __init__(
        self, folder: Path, options: DeviceOptions, hand_back: Callable[[Operation], None]
    ) -> None:
        self.path = folder
        self.is_failed = False
        self._errors = 0
        try:
            self._folder = SsdFolder(folder)
            try:
                self.space = SlabSpace(
                    folder,
                    options.capacity_bytes,
                    options.min_free_bytes,
                    self._folder.direct_flag,
                )
            except OSError:
                self._folder.unlock()
                raise
        except OSError as error:
            raise unusable(folder, error) from error
        self.owners = OwnerNumbers(self._folder.notes)
        # writes sync, and so take long: with threads of their own they do not delay reads
        self.readers = IoThreads(f"read {folder}", options.threads)
        self.writers = IoThreads(f"write {folder}", max(1, options.threads // 2))
        self.group_sync = GroupSync(str(folder), self.owners, hand_back)

    @property
    def notes(self) -> FolderNotes:
        """What the folder says of owners and drops."""
        return self._folder.notes

    # ---- start and end --------------------------------------------------------------

    def restore(self) -> dict[int, Records]:
        """What an earlier process left: the records of each slab, without dropped blocks.

        Slabs beyond the capacity go, those with the oldest blocks first. Raises
        :class:`DirectoryUnusable`, closed.
        """
        try:
            records = self._read_records()
            for number in sorted(records, key=lambda n: records[n]["sequence"].max()):
                if not self.space.is_too_large:
                    break
                del records[number]
                self.space.delete_unused(number)
            self._compact_notes(records.values())
        except OSError as error:
            self.close()
            raise unusable(self.path, error) from error
        return records

    def _read_records(self) -> dict[int, Records]:
        self.owners.read()
        known = set(self.owners.numbers.values())
        slabs = self.space.slabs
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            found = list(pool.map(lambda slab: slab.records(known), slabs.values()))
        self.owners.found({decode_owner(raw) for _, owners in found for raw in owners})
        return dict(zip(slabs, (records for records, _ in found), strict=True))

    def _compact_notes(self, tables: Collection[Records]) -> None:
        """Take dropped blocks out of what was found, and out of the notes what covers nothing."""
        named = (np.unique(table["owner"][table["sequence"] > 0]).tolist() for table in tables)
        self.owners.keep_only(set(itertools.chain.from_iterable(named)))
        drops = self.notes.drops()
        needed = apply_drops(tables, drops, self.owners.numbers)
        if len(needed) < len(drops):
            self.notes.rewrite_drops(needed)

    def close(self) -> None:
        """End the threads."""
        threads = (self.readers, self.writers, self.group_sync)
        if not all([each.close(CLOSE_TIMEOUT_S) for each in threads]):
            return  # a call hangs in the disk: its file must not be closed under it
        try:
            self.space.close()
        except OSError as error:
            logger.warning("SSD directory %s was not closed cleanly: %s", self.path, error)
        self._folder.unlock()

    # ---- slots and health -------------------------------------------------------------

    def take_slot(self, slot_bytes: int) -> tuple[Slab, int] | None:
        """A free slot; None: the device is full, or failed."""
        return None if self.is_failed else self.space.take_slot(slot_bytes)

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
