"""DRAM slots for blocks in registered memory: who is in which slot, and who needs it.

No I/O. A slot is free, being filled, or resident. Slots that are being filled or pinned
stay; the other resident ones are evictable, the least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from storage.block import BlockKey

SLOT_ALIGNMENT_BYTES = 4096


class NoSlot(Exception):
    """Every slot is being filled or pinned."""


class _Slot:
    __slots__ = ("index", "filling", "owners")

    def __init__(self, index: int) -> None:
        self.index = index
        self.filling = True
        self.owners: set[int] = set()


class SlotPool:
    """``memory`` cut into slots of ``block_bytes``, rounded up to 4096 bytes.

    Owners of pins are numbers: plans, or negative ones for uses inside the store. An
    owner pins a block at most once. Methods on a block that is not here raise KeyError.
    """

    def __init__(self, memory: memoryview, block_bytes: int) -> None:
        self._memory = memory.cast("B")
        self.block_bytes = block_bytes
        self.slot_bytes = -(-block_bytes // SLOT_ALIGNMENT_BYTES) * SLOT_ALIGNMENT_BYTES
        self.num_slots = self._memory.nbytes // self.slot_bytes
        if not self.num_slots:
            raise ValueError(
                f"{memory.nbytes} bytes of DRAM hold no block of {self.slot_bytes} bytes"
            )
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._slots: dict[BlockKey, _Slot] = {}
        self._num_filling = 0
        self._evictable: OrderedDict[BlockKey, None] = OrderedDict()
        self._pinned_by: defaultdict[int, dict[BlockKey, None]] = defaultdict(dict)

    # ---- questions ------------------------------------------------------------------

    @property
    def available(self) -> int:
        """Slots that :meth:`begin_fill` can have now: free or evictable."""
        return len(self._free) + len(self._evictable)

    @property
    def num_resident(self) -> int:
        """Blocks whose bytes are here."""
        return len(self._slots) - self._num_filling

    def is_resident(self, key: BlockKey) -> bool:
        slot = self._slots.get(key)
        return slot is not None and not slot.filling

    def is_evictable(self, key: BlockKey) -> bool:
        return key in self._evictable

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
        """The ``block_bytes`` of the block's slot."""
        offset = self.offset(key)
        return self._memory[offset : offset + self.block_bytes]

    # ---- filling --------------------------------------------------------------------

    def begin_fill(self, key: BlockKey) -> BlockKey | None:
        """Give a block that is not here a slot; returns the block evicted for it, if any.

        Raises :class:`NoSlot`.
        """
        if key in self._slots:
            raise ValueError(f"block {key.hex()} has a slot already")
        evicted = None
        if not self._free:
            if not self._evictable:
                raise NoSlot(f"all {self.num_slots} slots are being filled or pinned")
            evicted, _ = self._evictable.popitem(last=False)
            self._free.append(self._slots.pop(evicted).index)
        self._slots[key] = _Slot(self._free.pop())
        self._num_filling += 1
        return evicted

    def commit(self, key: BlockKey) -> None:
        """The slot's bytes are the block."""
        slot = self._slots[key]
        if not slot.filling:
            raise ValueError(f"block {key.hex()} is resident already")
        slot.filling = False
        self._num_filling -= 1
        if not slot.owners:
            self._evictable[key] = None

    def abandon(self, key: BlockKey) -> None:
        """The slot will not be filled: free it, and drop all pins on it."""
        slot = self._slots[key]
        if not slot.filling:
            raise ValueError(f"block {key.hex()} is resident")
        for owner in list(slot.owners):
            self.unpin(key, owner)
        del self._slots[key]
        self._free.append(slot.index)
        self._num_filling -= 1

    def evict_all(self) -> list[BlockKey]:
        """Free every resident slot that nobody has pinned; returns their blocks."""
        evicted = list(self._evictable)
        self._evictable.clear()
        self._free += [self._slots.pop(key).index for key in evicted]
        return evicted

    # ---- pins -----------------------------------------------------------------------

    def pin(self, key: BlockKey, owner: int) -> None:
        """Keep the block, resident or being filled, until the owner lets it go."""
        self._slots[key].owners.add(owner)
        self._pinned_by[owner][key] = None
        self._evictable.pop(key, None)

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
        if not slot.owners and not slot.filling:
            self._evictable[key] = None

    def unpin_all(self, owner: int) -> None:
        """Let go of everything that the owner has pinned.

        What it pinned first stays youngest: a prefix is of use only from its beginning.
        """
        for key in reversed(list(self._pinned_by.get(owner, ()))):
            self.unpin(key, owner)
