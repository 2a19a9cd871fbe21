"""What moves the blocks of an SSD tier, and what its folders need besides."""

from __future__ import annotations

import errno
import itertools
import logging
import time
from collections.abc import Sequence
from functools import partial

from storage.block_format import verify
from storage.index.owners import Selector
from storage.ssd.device import SsdDevice
from storage.ssd.notes import Drop
from storage.ssd.slab import Written
from storage.ssd.slots import SsdSlots
from storage.tiers.contract import BlockCorrupt, BlockMissing, DeviceStats, TierFull, TierStats
from storage.tiers.operation import Kind, Operation
from storage.tiers.operation_queue import OperationQueue
from storage.tiers.room import Room

logger = logging.getLogger(__name__)

FOLDER_CHECK_S = 1.0
"""Between looks at the room that others have left on the disks, and at requests to drop."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class SsdBackend:
    """A :class:`storage.tiers.placement.Backend`: each operation runs in a thread of its
    device, and a write is handed back once it is synced.

    ``first_sequence``: writes are numbered from there. ``failed_devices``: those that could not
    even be opened.
    """

    # the folders are this process's own: nobody else will read another format version
    removed_on = (BlockCorrupt, BlockMissing)

    def __init__(
        self,
        queue: OperationQueue,
        room: Room,
        slots: SsdSlots,
        first_sequence: int,
        failed_devices: int,
    ) -> None:
        self._queue = queue
        self._room = room
        self._slots = slots
        self._sequence = itertools.count(first_sequence)
        self._failed_devices = failed_devices
        self._next_check_s = 0.0
        self._drops: list[Selector] = []
        self._heed_requests()

    def close(self) -> None:
        self._note_counters()
        for device in self._slots.devices:
            device.close()

    def stats(self) -> TierStats:
        used = sum(not device.is_failed for device in self._slots.devices)
        devices = DeviceStats(used, self._failed_devices)
        return TierStats(self._room.stats(), self._queue.stats.snapshot(), devices)

    # ---- one block ----------------------------------------------------------------------

    def start(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            device = self._slots.at(operation.place).device
            threads = device.readers if operation.kind is Kind.READ else device.writers
            threads.submit(partial(self._run, operation))

    def _run(self, operation: Operation) -> None:
        """In an I/O thread."""
        operation.run(self._work)
        if operation.kind is Kind.WRITE and operation.error is None:
            device, slab, number = self._slots.at(operation.place)
            device.group_sync.sync_later(Written(operation, slab, number))
        else:
            self._queue.hand_back(operation)

    def _work(self, operation: Operation) -> None:
        if operation.kind is Kind.READ:
            self._load(operation)
        elif operation.kind is Kind.WRITE:
            self._store(operation)
        else:
            _, slab, number = self._slots.at(operation.place)
            slab.erase(number)

    def _load(self, operation: Operation) -> None:
        _, slab, number = self._slots.at(operation.place)
        try:
            header = slab.read(number, operation.buffer)
        except OSError as error:
            if error.errno == errno.EIO:
                raise BlockCorrupt("the disk cannot read the block") from error
            raise
        operation.label = verify(header, operation.buffer, operation.key).label

    def _store(self, operation: Operation) -> None:
        device, slab, number = self._slots.at(operation.place)
        operation.sequence = next(self._sequence)
        operation.written_ms = time.time_ns() // 1_000_000
        try:
            slab.write(number, operation)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise TierFull(f"{device.path}: {error.strerror}") from error
            raise

    def accept(self, operation: Operation) -> bool:
        """Judge the device by it."""
        device, slab, _ = self._slots.at(operation.place)
        if slab.file.is_refused:
            device.space.stop_growing(slab)
        if device.is_failed and operation.kind is Kind.WRITE:
            operation.error = operation.error or OSError(errno.EIO, "the disk was taken out")
        if device.note_result(_disk_error(operation.error)):
            self._take_out(device)
        return True

    def _take_out(self, device: SsdDevice) -> None:
        self._failed_devices += 1
        self._slots.take_out(device, self._room)

    # ---- now and then -------------------------------------------------------------------

    def tend(self) -> list[Operation]:
        now = time.monotonic()
        if now >= self._next_check_s:
            self._next_check_s = now + FOLDER_CHECK_S
            for device in self._slots.devices:
                if not device.is_failed and device.space.lacks_space():
                    self._slots.give_space_back(device, self._room)
            self._heed_requests()
            self._note_counters()
        return []

    def _note_counters(self) -> None:
        for device in self._slots.devices:
            try:
                device.notes.note_counters(self.stats())
            except OSError as error:
                logger.debug("counters are not noted in %s: %s", device.path, error)

    # ---- drops ----------------------------------------------------------------------------

    def drop(self, selector: Selector) -> None:
        """Durable: no later start finds the blocks. A disk that cannot note it is taken out."""
        sequence = next(self._sequence)
        for device in self._slots.devices:
            if device.is_failed:
                continue
            try:
                device.notes.add_drop(Drop(selector, sequence))
            except OSError as error:
                device.fail(error)
                self._take_out(device)

    def take_drops(self) -> list[Selector]:
        drops, self._drops = self._drops, []
        return drops

    def _heed_requests(self) -> None:
        """Drop what was asked for in any of the folders."""
        for device in self._slots.devices:
            for path, selector in device.notes.requests():
                logger.info("SSD tier drops %s, as asked for in %s", selector, path)
                self.drop(selector)
                self._room.held.drop(selector)
                self._queue.wake()
                self._drops.append(selector)
                path.unlink(missing_ok=True)


def _disk_error(error: Exception | None) -> OSError | None:
    """The disk's own complaint, if that is why the operation failed."""
    cause = error.__cause__ if isinstance(error, BlockCorrupt) else error
    return cause if isinstance(cause, OSError) else None
