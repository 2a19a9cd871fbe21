"""Where the blocks of an SSD tier lie: slots of slabs on several devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.block import BlockKey
from storage.ssd.device import SsdDevice
from storage.ssd.slab import Slab, slot_bytes_for
from storage.tiers.contract import EvictionCause
from storage.tiers.room import Room

_SLOT_BITS = 32


class Slot(NamedTuple):
    """One place."""

    device: SsdDevice
    slab: Slab
    number: int


class SsdSlots:
    """A :class:`storage.tiers.placement.Placement`: slab and slot make the place's number.

    Neighbours lie on different devices. Where a block of another size needs room, a slab makes
    way as a whole.
    """

    def __init__(self, devices: Sequence[SsdDevice]) -> None:
        self.devices = devices
        self.used_bytes = 0
        self.payload_bytes_min = 0
        """Of a slot: what is smaller has one of this size, so that objects of parts and their
        blocks give way to each other one by one, and not by slabs."""
        self._slabs: dict[int, tuple[SsdDevice, Slab]] = {}
        """By the upper bits of a place."""
        self._turn = 0

    @property
    def capacity_bytes(self) -> int:
        """What the devices in use may come to hold, as the disks are now."""
        return sum(device.space.capacity_bytes for device in self.devices if not device.is_failed)

    def place(self, slot: Slot) -> int:
        """The number of a slot: device and slab in the upper bits."""
        slab_id = slot.slab.number * len(self.devices) + self.devices.index(slot.device)
        self._slabs[slab_id] = slot.device, slot.slab
        return slab_id << _SLOT_BITS | slot.number

    def at(self, place: int | None) -> Slot:
        """The slot in a place that was given out."""
        assert place is not None
        device, slab = self._slabs[place >> _SLOT_BITS]
        return Slot(device, slab, place & (1 << _SLOT_BITS) - 1)

    def adopt(self, places: NDArray[np.int64]) -> None:
        """At a start, of slabs that were found: blocks lie in these places, sorted, and the
        other slots are free."""
        for slab_id, (device, slab) in self._slabs.items():
            first, last = np.searchsorted(places, _places_of(slab_id))
            device.space.adopt(slab, places[first:last] - (slab_id << _SLOT_BITS))
            self.used_bytes += int(last - first) * slab.slot_bytes

    # ---- the placement ----------------------------------------------------------------

    def stored_bytes(self, nbytes: int) -> int:
        return slot_bytes_for(max(nbytes, self.payload_bytes_min))

    def bytes_at(self, place: int) -> int:
        return self._slabs[place >> _SLOT_BITS][1].slot_bytes

    def reserve(self, nbytes: int, room: Room) -> int | None:
        slot_bytes = self.stored_bytes(nbytes)
        place = self._take(slot_bytes)
        while place is None and self._make_way(slot_bytes, room):
            place = self._take(slot_bytes)
        if place is not None:
            self.used_bytes += slot_bytes
        return place

    def release(self, place: int) -> None:
        device, slab, number = self.at(place)
        device.space.give_back(slab, number)
        self.used_bytes -= slab.slot_bytes

    def erase(self, key: BlockKey) -> None:
        """The next block will overwrite its slot."""

    def _take(self, slot_bytes: int) -> int | None:
        """A free slot of the next device in turn that has one."""
        for _ in self.devices:
            self._turn = (self._turn + 1) % len(self.devices)
            device = self.devices[self._turn]
            if (taken := device.take_slot(slot_bytes)) is not None:
                return self.place(Slot(device, *taken))
        return None

    # ---- slabs that make way ------------------------------------------------------------

    def _make_way(self, slot_bytes: int, room: Room) -> bool:
        """Evict the first victim; if its slot has another size, with all the others of its
        slab, and the slab."""
        not_idle: set[int] = set()
        for key, slab_id in self._victims(room):
            if slab_id in not_idle:
                continue
            if self._slabs[slab_id][1].slot_bytes == slot_bytes:
                room.evict(key, EvictionCause.CAPACITY)
                return True
            if self._evict_slab(slab_id, EvictionCause.SLOT_SIZE, room):
                return True
            not_idle.add(slab_id)
        return False

    def give_space_back(self, device: SsdDevice, room: Room) -> None:
        """Evict one slab of the device, that of the first victim whose slab is idle."""
        seen: set[int] = set()
        for _, slab_id in self._victims(room):
            if slab_id not in seen and self._slabs[slab_id][0] is device:
                if self._evict_slab(slab_id, EvictionCause.DISK_SPACE, room):
                    return
                seen.add(slab_id)

    def take_out(self, device: SsdDevice, room: Room) -> None:
        """Let go of all that lies on the device."""
        for slab_id, (owner, _) in self._slabs.items():
            if owner is device:
                for key in room.held.index.between(*_places_of(slab_id)):
                    room.lose(key)

    def _victims(self, room: Room) -> Iterator[tuple[BlockKey, int]]:
        """Each with the number of its slab."""
        for key in room.victims():
            place = room.held.index.get(key)
            assert place is not None
            yield key, place >> _SLOT_BITS

    def _evict_slab(self, slab_id: int, cause: EvictionCause, room: Room) -> bool:
        """False if anything in it is in use."""
        device, slab = self._slabs[slab_id]
        keys = room.held.index.between(*_places_of(slab_id))
        if len(keys) + len(slab.free) < slab.num_slots or not all(map(room.is_idle, keys)):
            return False
        for key in keys:
            room.evict(key, cause)
        device.space.discard(slab)
        del self._slabs[slab_id]
        return True


def _places_of(slab_id: int) -> tuple[int, int]:
    """A slab's first place, and the one behind its last."""
    return slab_id << _SLOT_BITS, slab_id + 1 << _SLOT_BITS
