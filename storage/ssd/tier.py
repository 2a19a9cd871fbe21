"""Blocks in slots of preallocated slabs on local disks; docs/storage.md."""

from __future__ import annotations

import errno
import itertools
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.block import BlockKey, TierName
from storage.block_format import verify
from storage.index.owners import Quota, Selector
from storage.ssd.device import SsdDevice
from storage.ssd.folder import DirectoryLocked, DirectoryUnusable
from storage.ssd.notes import Drop
from storage.ssd.slab import Slab, Written, slot_bytes_for
from storage.ssd.slab_records import keys_of, latest
from storage.ssd.slab_table import RECORD
from storage.tiers.contract import (
    BlockCorrupt,
    BlockMissing,
    EvictionCause,
    TierFull,
    TierStats,
    Wake,
)
from storage.tiers.operation import Kind, Operation
from storage.tiers.threaded_tier import Executor, ThreadedTier

__all__ = ["DirectoryLocked", "DirectoryUnusable", "SsdTier"]

logger = logging.getLogger(__name__)

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FOLDER_CHECK_S = 1.0
"""Between looks at the room that others have left on the disks, and at requests to drop."""
_SLOT_BITS = 32
_Records = dict[int, NDArray[np.void]]
"""Of each slab of a device."""

_NOTHING = np.empty(0, np.int64)


class SsdTier(ThreadedTier):
    """Blocks in fixed slots, striped over the folders, evicted least recently used.

    A folder is a disk, and gets an equal part of ``capacity_bytes`` and ``threads`` readers;
    ``min_free_bytes`` of it stay free, whoever else fills it.
    A write is complete once it would survive a power cut, for which blocks are synced in
    groups. Blocks of an earlier process are found again at start; their bytes are verified
    when read. A disk that fails is taken out with all it holds, and the rest goes on.
    Raises :class:`DirectoryLocked`, or :class:`DirectoryUnusable` if no folder is usable.
    """

    # the folders are this process's own: nobody else will read another format version
    removed_on = (BlockCorrupt, BlockMissing)

    def __init__(
        self,
        folders: str | Path | Sequence[str | Path],
        capacity_bytes: int,
        on_wake: Wake,
        threads: int = 16,
        min_free_bytes: int = 0,
        quotas: Sequence[Quota] = (),
    ) -> None:
        super().__init__(TierName.SSD, on_wake, capacity_bytes, quotas=quotas)
        paths = [folders] if isinstance(folders, str | Path) else folders
        self._devices: list[SsdDevice] = []
        self._slabs: dict[int, tuple[SsdDevice, Slab]] = {}
        """By the upper bits of a place."""
        self._turn = 0
        self._next_check_s = 0.0
        self._drops: list[Selector] = []
        try:
            restored = self._open(
                *([Path(path) for path in paths], capacity_bytes // len(paths)),
                *(min_free_bytes, threads),
            )
            last_sequence = self._index_all(restored)
        except BaseException:
            self.close()
            raise
        self._sequence = itertools.count(last_sequence + 1)
        self._heed_requests()

    def close(self) -> None:
        self._note_counters()
        for device in self._devices:
            device.close()

    def stats(self) -> TierStats:
        used = [device for device in self._devices if not device.is_failed]
        self._stats.devices = len(used)
        self._stats.capacity_bytes = sum(device.capacity_bytes for device in used)
        return super().stats()

    # ---- start ----------------------------------------------------------------------

    def _open(
        self, paths: Sequence[Path], capacity_bytes: int, min_free_bytes: int, threads: int
    ) -> list[_Records]:
        """Returns what each device holds."""
        restored = []
        for path in paths:
            try:
                device = SsdDevice(
                    *(path, capacity_bytes, min_free_bytes, threads, super()._hand_back)
                )
                restored.append(device.restore())
            except DirectoryUnusable as error:
                if path is paths[-1] and not self._devices:
                    raise
                logger.error("SSD tier goes on without a folder: %s", error)
                self._stats.failed_devices += 1
            else:
                self._devices.append(device)
        return restored

    def _index_all(self, restored: Sequence[_Records]) -> int:
        """Index what is there, the oldest first; returns the greatest sequence."""
        parts, places, sizes = [np.zeros(0, RECORD)], [_NOTHING], [_NOTHING]
        for device, by_slab in zip(self._devices, restored, strict=True):
            for number, records in by_slab.items():
                slab = device.slabs[number]
                fits = records["payload_bytes"] <= slab.payload_bytes_max
                slots = np.flatnonzero(fits & (records["sequence"] > 0))
                parts.append(records[slots])
                places.append(self._place(device, slab, 0) + slots)
                sizes.append(np.full(len(slots), slab.slot_bytes))
        blocks, held = np.concatenate(parts), np.concatenate(places)
        order = latest(blocks)
        self._fill_index(blocks[order], held[order], np.concatenate(sizes)[order])
        # what is written from now on comes after whatever was dropped
        dropped = [drop.sequence for device in self._devices for drop in device.notes.drops()]
        return max(int(blocks["sequence"].max(initial=0)), *dropped, 0)

    def _fill_index(
        self, blocks: NDArray[np.void], places: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> None:
        owners = {n: owner for device in self._devices for n, owner in device.owners.items()}
        numbers, owner_of = np.unique(blocks["owner"], return_inverse=True)
        self._index.load(
            *(keys_of(blocks["key"]), places, keys_of(blocks["parent"]), sizes),
            *([owners[number] for number in numbers.tolist()], owner_of),
        )
        held = np.sort(places)
        for slab_id, (device, slab) in self._slabs.items():
            first, last = np.searchsorted(held, (slab_id << _SLOT_BITS, slab_id + 1 << _SLOT_BITS))
            device.adopt(slab, held[first:last] - (slab_id << _SLOT_BITS))
            self._stats.used_bytes += int(last - first) * slab.slot_bytes

    # ---- one block, in an I/O thread --------------------------------------------------

    def _executor(self, operation: Operation) -> Executor:
        device = self._at(operation.place)[0]
        return device.readers if operation.kind is Kind.READ else device.writers

    def _load(self, operation: Operation) -> None:
        _, slab, slot = self._at(operation.place)
        try:
            header = slab.read(slot, operation.buffer)
        except OSError as error:
            if error.errno == errno.EIO:
                raise BlockCorrupt("the disk cannot read the block") from error
            raise
        operation.label = verify(header, operation.buffer, operation.key).label

    def _store(self, operation: Operation) -> None:
        device, slab, slot = self._at(operation.place)
        operation.sequence = next(self._sequence)
        operation.written_ms = time.time_ns() // 1_000_000
        try:
            slab.write(slot, operation)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise TierFull(f"{device.path}: {error.strerror}") from error
            raise

    def _hand_back(self, operation: Operation) -> None:
        """A block that was written is handed back once it is synced."""
        if operation.kind is Kind.WRITE and operation.error is None:
            device, slab, slot = self._at(operation.place)
            device.sync_later(Written(operation, slab, slot))
        else:
            super()._hand_back(operation)

    def _remove(self, operation: Operation) -> None:
        _, slab, slot = self._at(operation.place)
        slab.erase(slot)

    # ---- places ---------------------------------------------------------------------

    def _place(self, device: SsdDevice, slab: Slab, slot: int) -> int:
        """The number of a slot: device and slab in the upper bits."""
        slab_id = slab.number * len(self._devices) + self._devices.index(device)
        self._slabs[slab_id] = device, slab
        return slab_id << _SLOT_BITS | slot

    def _at(self, place: int | None) -> tuple[SsdDevice, Slab, int]:
        assert place is not None
        device, slab = self._slabs[place >> _SLOT_BITS]
        return device, slab, place & (1 << _SLOT_BITS) - 1

    def _stored_bytes(self, nbytes: int) -> int:
        return slot_bytes_for(nbytes)

    def _bytes_at(self, place: int) -> int:
        return self._at(place)[1].slot_bytes

    def _reserve(self, nbytes: int) -> int | None:
        slot_bytes = slot_bytes_for(nbytes)
        place = self._take_place(slot_bytes)
        while place is None and self._make_room(slot_bytes):
            place = self._take_place(slot_bytes)
        if place is not None:
            self._stats.used_bytes += slot_bytes
        return place

    def _take_place(self, slot_bytes: int) -> int | None:
        """The next device in turn that has a free slot, so that neighbours lie apart."""
        for _ in self._devices:
            self._turn = (self._turn + 1) % len(self._devices)
            device = self._devices[self._turn]
            if (taken := device.take_slot(slot_bytes)) is not None:
                return self._place(device, *taken)
        return None

    def _make_room(self, slot_bytes: int) -> bool:
        """Evict the first victim; if its slot has another size, with all the others of its
        slab, and the slab."""
        not_idle: set[int] = set()
        for key in self._index.victims(self._is_idle):
            slab_id = self._index.place(key) >> _SLOT_BITS
            if slab_id in not_idle:
                continue
            if self._slabs[slab_id][1].slot_bytes == slot_bytes:
                self._evict(key, EvictionCause.CAPACITY)
                return True
            if self._evict_slab(slab_id, EvictionCause.SLOT_SIZE):
                return True
            not_idle.add(slab_id)
        return False

    def _evict_slab(self, slab_id: int, cause: EvictionCause) -> bool:
        """False if anything in it is in use."""
        device, slab = self._slabs[slab_id]
        keys = self._index.between(slab_id << _SLOT_BITS, slab_id + 1 << _SLOT_BITS)
        if len(keys) + len(slab.free) < slab.num_slots or not all(map(self._is_idle, keys)):
            return False
        for key in keys:
            self._evict(key, cause)
        device.discard(slab)
        del self._slabs[slab_id]
        return True

    def _erase(self, key: BlockKey) -> None:
        """The next block will overwrite its slot."""

    def _release(self, place: int | None) -> None:
        if place is not None:
            device, slab, slot = self._at(place)
            device.give_back(slab, slot)
            self._stats.used_bytes -= slab.slot_bytes

    # ---- disks that fill or fail ------------------------------------------------------

    def _drain(self) -> None:
        super()._drain()
        now = time.monotonic()
        if now >= self._next_check_s:
            self._next_check_s = now + FOLDER_CHECK_S
            for device in self._devices:
                if not device.is_failed and device.lacks_space():
                    self._give_space_back(device)
            self._heed_requests()
            self._note_counters()

    def _note_counters(self) -> None:
        for device in self._devices:
            try:
                device.notes.note_counters(self.stats())
            except OSError as error:
                logger.debug("counters are not noted in %s: %s", device.path, error)

    def _give_space_back(self, device: SsdDevice) -> None:
        """Evict one slab, that of the first victim whose slab is idle."""
        seen: set[int] = set()
        for key in self._index.victims(self._is_idle):
            slab_id = self._index.place(key) >> _SLOT_BITS
            if slab_id not in seen and self._slabs[slab_id][0] is device:
                if self._evict_slab(slab_id, EvictionCause.DISK_SPACE):
                    return
                seen.add(slab_id)

    def _end(self, operation: Operation) -> None:
        device, slab, _ = self._at(operation.place)
        if slab.is_refused:
            device.stop_growing(slab)
        if device.is_failed and operation.kind is Kind.WRITE:
            operation.error = operation.error or OSError(errno.EIO, "the disk was taken out")
        super()._end(operation)
        if device.note_result(_disk_error(operation.error)):
            self._take_out(device)

    def _take_out(self, device: SsdDevice) -> None:
        self._stats.failed_devices += 1
        for slab_id, (owner, _) in list(self._slabs.items()):
            if owner is device:
                for key in self._index.between(slab_id << _SLOT_BITS, slab_id + 1 << _SLOT_BITS):
                    self._release(self._lose(key))

    # ---- drops ----------------------------------------------------------------------

    def drop(self, selector: Selector) -> None:
        """Durable: no later start finds the blocks. A disk that cannot note it is taken out."""
        sequence = next(self._sequence)
        for device in self._devices:
            if device.is_failed:
                continue
            try:
                device.notes.add_drop(Drop(selector, sequence))
            except OSError as error:
                device.fail(error)
                self._take_out(device)
        super().drop(selector)

    def take_drops(self) -> list[Selector]:
        drops, self._drops = self._drops, []
        return drops

    def _heed_requests(self) -> None:
        """Drop what was asked for in any of the folders."""
        for device in self._devices:
            for path, selector in device.notes.requests():
                logger.info("SSD tier drops %s, as asked for in %s", selector, path)
                self.drop(selector)
                self._drops.append(selector)
                path.unlink(missing_ok=True)


def _disk_error(error: Exception | None) -> OSError | None:
    """The disk's own complaint, if that is why the operation failed."""
    cause = error.__cause__ if isinstance(error, BlockCorrupt) else error
    return cause if isinstance(cause, OSError) else None
