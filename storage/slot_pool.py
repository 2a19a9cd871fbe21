"""DRAM slots for blocks in registered memory: who is in which slot, and who needs it.

No I/O. A slot is free, being filled, or resident. Slots that are being filled or pinned
stay; the other resident ones are evictable, in the order of :mod:`storage.index.index`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from common.block import UNLABELLED, BlockKey, BlockLabel
from storage.index.index import BlockIndex
from storage.index.owners import OwnerGroups, Selector

SLOT_ALIGNMENT_BYTES = 4096


class NoSlot(Exception):
    """Every slot is being filled or pinned."""


class _Slot:
    __slots__ = ("index", "nbytes", "filling", "owners", "label")

    def __init__(self, index: int, nbytes: int) -> None:
        self.index = index
        self.nbytes = nbytes
        self.filling = True
        self.owners: set[int] = set()
        self.label = UNLABELLED


class SlotPool:
    """``memory`` cut into slots of ``block_bytes``, rounded up to 4096 bytes. What lies in one may
    be smaller: an object of a part.

    Owners of pins are numbers: plans, or negative ones for uses inside the store. An
    owner pins a block at most once. Methods on a block that is not here raise KeyError.
    """

    def __init__(self, memory: memoryview, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.slot_bytes = -(-block_bytes // SLOT_ALIGNMENT_BYTES) * SLOT_ALIGNMENT_BYTES
        self.num_slots = memory.nbytes // self.slot_bytes
        if not self.num_slots:
            raise ValueError(
                f"{memory.nbytes} bytes of DRAM hold no block of {self.slot_bytes} bytes"
            )
        self.memory = memory.cast("B")[: self.num_slots * self.slot_bytes]
        """All slots, writable."""
        self.resident = BlockIndex()
        """Blocks whose bytes are here, by slot; only the pool adds and takes."""
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._slots: dict[BlockKey, _Slot] = {}
        self._num_pinned = 0
        """Of the resident ones."""
        self.owners = OwnerGroups()
        """Of the resident ones."""
        self._pinned_by: defaultdict[int, dict[BlockKey, None]] = defaultdict(dict)

    # ---- questions ------------------------------------------------------------------

    @property
    def available(self) -> int:
        """Slots that :meth:`begin_fill` can have now: free or evictable."""
        return len(self._free) + len(self.resident) - self._num_pinned

    def is_evictable(self, key: BlockKey) -> bool:
        return key in self.resident and not self._slots[key].owners

    def label(self, key: BlockKey) -> BlockLabel:
        """With which the block was committed."""
        return self._slots[key].label

    def is_pinned_by(self, key: BlockKey, owner: int) -> bool:
        slot = self._slots.get(key)
        return slot is not None and owner in slot.owners

    def offset(self, key: BlockKey) -> int:
        """First byte of the block's slot, from the start of the memory."""
        return self._slots[key].index * self.slot_bytes

    def offsets(self, keys: Sequence[BlockKey]) -> NDArray[np.int64]:
        """:meth:`offset` of each block; shape (len(keys),)."""
        slots = self._slots
        indices = np.fromiter((slots[key].index for key in keys), np.int64, len(keys))
        return indices * self.slot_bytes

    def buffer(self, key: BlockKey) -> memoryview:
        """The block's bytes."""
        slot = self._slots[key]
        offset = slot.index * self.slot_bytes
        return self.memory[offset : offset + slot.nbytes]

    # ---- filling --------------------------------------------------------------------

    def begin_fill(self, key: BlockKey, nbytes: int = 0) -> BlockKey | None:
        """Give a block that is not here a slot; returns the block evicted for it, if any.

        ``nbytes``: its size; 0: a slot's. Raises :class:`NoSlot`.
        """
        if key in self._slots:
            raise ValueError(f"block {key.hex()} has a slot already")
        evicted = None
        if not self._free:
            evicted = next(self.resident.victims(self.is_evictable), None)
            if evicted is None:
                raise NoSlot(f"all {self.num_slots} slots are being filled or pinned")
            self.evict([evicted])
        self._slots[key] = _Slot(self._free.pop(), nbytes or self.block_bytes)
        return evicted

    def commit(self, key: BlockKey, label: BlockLabel = UNLABELLED) -> None:
        """The slot's bytes are the block."""
        slot = self._slots[key]
        if not slot.filling:
            raise ValueError(f"block {key.hex()} is resident already")
        slot.filling, slot.label = False, label
        self._num_pinned += bool(slot.owners)
        group = self.owners.group_of(label.owner)
        self.owners.note(group, 1, self.slot_bytes)
        self.resident.add(key, slot.index, label.parent, group)

    def abandon(self, key: BlockKey) -> None:
        """The slot will not be filled: free it, and drop all pins on it."""
        slot = self._slots[key]
        if not slot.filling:
            raise ValueError(f"block {key.hex()} is resident")
        for owner in list(slot.owners):
            self.unpin(key, owner)
        del self._slots[key]
        self._free.append(slot.index)

    def evict(self, keys: Iterable[BlockKey]) -> list[BlockKey]:
        """Free the slots of those of the blocks that are evictable; returns them."""
        evicted = [key for key in keys if self.is_evictable(key)]
        for key in evicted:
            self.owners.note(self.resident.group(key), -1, -self.slot_bytes)
            self.resident.pop(key)
            self._free.append(self._slots.pop(key).index)
        return evicted

    def drop(self, selector: Selector) -> list[BlockKey]:
        """Evict the blocks of some owners, and return them. What is pinned is left to eviction."""
        return self.evict(self.resident.of_groups(self.owners.drop(selector)))

    # ---- pins -----------------------------------------------------------------------

    def pin(self, key: BlockKey, owner: int) -> None:
        """Keep the block, resident or being filled, until the owner lets it go."""
        self._num_pinned += self.is_evictable(key)
        self._slots[key].owners.add(owner)
        self._pinned_by[owner][key] = None

    def unpin(self, key: BlockKey, owner: int) -> None:
        """Let one block go; nothing happens if the owner has not pinned it."""
        if not self.is_pinned_by(key, owner):
            return
        slot = self._slots[key]
        slot.owners.discard(owner)
        pinned = self._pinned_by[owner]
        del pinned[key]
        if not pinned:
            del self._pinned_by[owner]
        self._num_pinned -= self.is_evictable(key)

    def unpin_all(self, owner: int) -> None:
        """Let go of everything that the owner has pinned.

        It has used the blocks until now, in the order in which it pinned them.
        """
        pinned = list(self._pinned_by.get(owner, ()))
        self.resident.refresh(pinned)
        for key in pinned:
            self.unpin(key, owner)
