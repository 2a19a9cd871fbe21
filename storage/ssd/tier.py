"""Blocks in slots of preallocated slabs on local disks; docs/storage.md."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.block import TierName
from storage.index.held_blocks import FoundBlocks, HeldBlocks
from storage.index.owners import Quota
from storage.ssd.backend import SsdBackend
from storage.ssd.device import DeviceOptions, SsdDevice
from storage.ssd.folder import DirectoryLocked, DirectoryUnusable, DiskBroken
from storage.ssd.slab_records import Records, keys_of, latest, owners_of
from storage.ssd.slab_table import RECORD
from storage.ssd.slots import Slot, SsdSlots
from storage.tiers.block_tier import BlockTier
from storage.tiers.contract import Wake
from storage.tiers.operation_queue import OperationQueue
from storage.tiers.room import Room
from storage.witnesses import FolderKeeper, Keeper

__all__ = ["DirectoryLocked", "DirectoryUnusable", "DiskBroken", "SsdTier"]

logger = logging.getLogger(__name__)

_NOTHING = np.empty(0, np.int64)


class SsdTier(BlockTier):
    """Blocks in fixed slots, striped over the folders, evicted least recently used.

    A folder is a disk, and gets an equal part of ``capacity_bytes`` and ``threads`` readers;
    ``min_free_bytes`` of it stay free, whoever else fills it.
    A write is complete once it would survive a power cut, for which blocks are synced in
    groups. Blocks of an earlier process are found again at start; their bytes are verified
    when read. A disk that fails is taken out with all it holds, and the rest goes on.
    Raises :class:`DirectoryLocked`, or :class:`DirectoryUnusable` if no folder is usable.
    """

    def __init__(
        self,
        folders: str | Path | Sequence[str | Path],
        capacity_bytes: int,
        on_wake: Wake,
        threads: int = 16,
        min_free_bytes: int = 0,
        quotas: Sequence[Quota] = (),
    ) -> None:
        paths = [Path(path) for path in ([folders] if isinstance(folders, str | Path) else folders)]
        queue = OperationQueue(on_wake)
        options = DeviceOptions(capacity_bytes // len(paths), min_free_bytes, threads)
        opened = _open(paths, options, queue)
        try:
            slots = SsdSlots([each.device for each in opened])
            held = HeldBlocks(TierName.SSD, slots.bytes_at, quotas)
            last_sequence = _index_all(opened, slots, held)
            room = Room(held, slots, queue.is_idle)
            failed = len(paths) - len(opened)
            backend = SsdBackend(queue, room, slots, last_sequence + 1, failed)
        except BaseException:  # whatever went wrong, the folders are locked and threads run
            _close(opened)
            raise
        super().__init__(TierName.SSD, queue, room, backend)
        self._slots = slots
        self.keepers: list[Keeper] = [FolderKeeper(each.device.path) for each in opened]

    def share_slots(self, payload_bytes: int) -> None:
        """Give whatever is smaller a slot for so many bytes: all that one agent stores has slots of
        one size."""
        self._slots.payload_bytes_min = payload_bytes


class _Opened(NamedTuple):
    """A device, and what an earlier process left in each of its slabs."""

    device: SsdDevice
    records: Mapping[int, Records]


def _open(paths: Sequence[Path], options: DeviceOptions, queue: OperationQueue) -> list[_Opened]:
    """Every usable folder; raises like :class:`SsdTier`."""
    opened: list[_Opened] = []
    for path in paths:
        try:
            device = SsdDevice(path, options, queue.hand_back)
            opened.append(_Opened(device, device.restore()))
        except DirectoryUnusable as error:
            if path is paths[-1] and not opened:
                raise
            logger.error("SSD tier goes on without a folder: %s", error)
        except BaseException:  # such as DirectoryLocked: those before it are locked by now
            _close(opened)
            raise
    return opened


def _close(opened: Sequence[_Opened]) -> None:
    for each in opened:
        each.device.close()


def _index_all(opened: Sequence[_Opened], slots: SsdSlots, held: HeldBlocks) -> int:
    """Index what is there, the oldest first; returns the greatest sequence."""
    parts, places, sizes = [np.zeros(0, RECORD)], [_NOTHING], [_NOTHING]
    for device, by_slab in opened:
        for number, records in by_slab.items():
            slab = device.space.slabs[number]
            fits = records["payload_bytes"] <= slab.payload_bytes_max
            used = np.flatnonzero(fits & (records["sequence"] > 0))
            parts.append(records[used])
            places.append(slots.place(Slot(device, slab, 0)) + used)
            sizes.append(np.full(len(used), slab.slot_bytes))
    blocks, place_of = np.concatenate(parts), np.concatenate(places)
    order = latest(blocks)
    indexed = blocks[order]
    owners = {n: owner for each in opened for owner, n in each.device.owners.numbers.items()}
    owners_found, owner_of = owners_of(indexed, owners)
    held.load(
        FoundBlocks(
            keys=keys_of(indexed["key"]),
            places=place_of[order],
            parents=keys_of(indexed["parent"]),
            stored_bytes=np.concatenate(sizes)[order],
            owners=owners_found,
            owner_of=owner_of,
        )
    )
    slots.adopt(np.sort(place_of[order]))
    # what is written from now on comes after whatever was dropped
    dropped = [drop.sequence for each in opened for drop in each.device.notes.drops()]
    return max(int(blocks["sequence"].max(initial=0)), *dropped, 0)
