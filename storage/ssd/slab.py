"""A preallocated file of equal slots, one block each; docs/storage.md has the bytes."""

from __future__ import annotations

import mmap
import os
import re
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.block_format import (
    HEADER_BYTES,
    HEADER_FIELDS,
    MAGIC,
    VERSION,
    encode_header,
    has_right_checksum,
)
from storage.ssd.direct_io import PAGE_BYTES, EndOfFile, Scratch, padded, read_or_fill
from storage.ssd.slab_file import SlabFile
from storage.ssd.slab_table import (
    ENTRY_BYTES,
    FREE_ENTRY,
    RECORD,
    SlabTable,
    encode_entry,
    owner_number,
    table_bytes_for,
)
from storage.tiers.contract import BlockCorrupt
from storage.tiers.operation import Operation

SEQUENTIAL_SLOT_BYTES_MAX = 32 << 10
"""Slots up to this size are read whole when headers are looked for: that takes a disk less
time than single pages do."""
HEADERS_AT_ONCE = 1024
"""Slots that a scan looks at together."""
_NAME = re.compile(r"(\d{6,})-(\d+)x([1-9]\d*)\.slab")
"""Number, bytes of a slot, slots."""
_scratch = Scratch()


def slot_bytes_for(payload_bytes: int) -> int:
    """Size of the slots that hold such payloads."""
    return HEADER_BYTES + padded(payload_bytes)


def slots_within(nbytes: int, slot_bytes: int) -> int:
    """How many slots a slab of so many bytes has, its table included."""
    return max(0, nbytes - PAGE_BYTES) // (slot_bytes + ENTRY_BYTES)


class Written(NamedTuple):
    """A block in its slot that is not durable yet."""

    operation: Operation
    slab: Slab
    slot: int


class Slab:
    """A table, and ``num_slots`` slots of ``slot_bytes``: a header page and a payload, padded
    to pages.

    The headers are the truth; the table repeats what a start has to know of them.

    Slots are given out and taken back by the owner's thread. Everything else runs in I/O
    threads, may be called by several at once, and raises OSError.
    """

    def __init__(
        self,
        folder: Path,
        number: int,
        slot_bytes: int,
        num_slots: int,
        direct_flag: int,
        is_read_only: bool = False,
    ) -> None:
        self.number = number
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self.free = list(range(num_slots - 1, -1, -1))
        """Slots without a block, the next one last."""
        self.unsynced: deque[Written] = deque()
        self.sync_turn = threading.Lock()
        """Taken for a thread that will look at ``unsynced``, so that what is written until
        then makes one group."""
        self._table = SlabTable(num_slots)
        self._table_bytes = table_bytes_for(num_slots)
        path = folder / f"{number:06d}-{slot_bytes}x{num_slots}.slab"
        self.file = SlabFile(path, self._at(num_slots), direct_flag, is_read_only)

    @classmethod
    def found(cls, path: Path, direct_flag: int, is_read_only: bool = False) -> Slab | None:
        """The slab in a file of an earlier process, or to be looked at beside its owner; None
        if the file is something else."""
        match = _NAME.fullmatch(path.name)
        if match is None:
            return None
        number, slot_bytes, num_slots = map(int, match.groups())
        if slot_bytes <= HEADER_BYTES or slot_bytes % HEADER_BYTES:
            return None
        return cls(path.parent, number, slot_bytes, num_slots, direct_flag, is_read_only)

    @property
    def nbytes(self) -> int:
        """Of its slots; a part of a hundredth or less comes to it for the table."""
        return self.num_slots * self.slot_bytes

    def _at(self, slot: int) -> int:
        """Where a slot begins in the file."""
        return self._table_bytes + slot * self.slot_bytes

    @property
    def payload_bytes_max(self) -> int:
        return self.slot_bytes - HEADER_BYTES

    # ---- one slot -------------------------------------------------------------------

    def read(self, slot: int, payload: memoryview) -> memoryview:
        """Fill ``payload``; returns the header, valid until this thread's next call.

        Raises BlockCorrupt if there are not so many bytes.
        """
        if payload.nbytes > self.payload_bytes_max:
            raise BlockCorrupt(f"a slot of {self.slot_bytes} bytes, expected {payload.nbytes}")
        try:
            return _scratch.read(self.file.opened(), self._at(slot), payload)
        except EndOfFile as error:
            raise BlockCorrupt(str(error)) from error

    def write(self, slot: int, operation: Operation) -> None:
        """Not durable before the file is synced."""
        header = encode_header(
            operation.key,
            operation.buffer,
            operation.label,
            operation.sequence,
            operation.written_ms,
        )
        _scratch.write(self.file.opened(), self._at(slot), header, operation.buffer)

    def record(self, blocks: Iterable[tuple[Written, int]]) -> None:
        """Note blocks that were written here, each with its owner's number, in the table."""
        entries = {each.slot: encode_entry(each.slot, each.operation, n) for each, n in blocks}
        self._table.update(self.file.opened(), entries)

    def read_whole(self, slot: int, memory: memoryview) -> memoryview:
        """A slot's bytes, header and all, in page-aligned memory of at least that size."""
        part = memory[: self.slot_bytes]
        count = os.preadv(self.file.opened(), [part], self._at(slot))
        return part[:count]

    def key_at(self, slot: int) -> bytes:
        """Of the block that lies in a slot, as the table says; zeros if it names none."""
        return self._table.read(self.file.opened())[0]["key"][slot].tobytes()

    def erase(self, slot: int) -> None:
        """Make the slot empty, so that no later start finds what it held."""
        self._table.update(self.file.opened(), {slot: FREE_ENTRY})
        _scratch.write(self.file.opened(), self._at(slot), bytes(HEADER_BYTES), memoryview(b""))

    # ---- all slots ------------------------------------------------------------------

    def records(self, known_owners: Collection[int]) -> tuple[NDArray[np.void], set[bytes]]:
        """What lies in each slot; shape (num_slots,). From the table; and from the header where
        the table's entry is damaged, or names none of the owners. Such entries are written
        anew, unless the slab is read only. With it, the bytes of owners that headers told.

        A slot whose header is asked and has another format version, is damaged or cannot be
        read counts as free.
        """
        records, is_asked = self._table.read(self.file.opened())
        known = np.fromiter(known_owners, np.uint64, len(known_owners))
        is_asked |= (records["sequence"] > 0) & ~np.isin(records["owner"], known)
        owners: set[bytes] = set()
        if not is_asked.any():
            return records, owners
        for first in np.unique(np.flatnonzero(is_asked) // HEADERS_AT_ONCE * HEADERS_AT_ONCE):
            found, raw = _records_of(self._headers(int(first)))
            part = slice(first, first + len(found))
            records[part][is_asked[part]] = found[is_asked[part]]
            owners |= raw
        if not self.file.is_read_only:
            self._table.write(self.file.opened(), records)
        return records, owners

    def headers(self) -> Iterator[tuple[int, NDArray[np.void]]]:
        """(first slot, fields of headers, as they lie there), from the first slot to the last."""
        for first in range(0, self.num_slots, HEADERS_AT_ONCE):
            yield first, self._headers(first).view(HEADER_FIELDS)[:, 0]

    def _headers(self, first: int) -> NDArray[np.uint8]:
        """Those of ``HEADERS_AT_ONCE`` slots, or less at the end; shape (n, HEADER_BYTES).
        Zeros where the disk cannot read."""
        fd, count = self.file.opened(), min(HEADERS_AT_ONCE, self.num_slots - first)
        whole = self.slot_bytes <= SEQUENTIAL_SLOT_BYTES_MAX
        step_bytes = self.slot_bytes if whole else HEADER_BYTES
        memory = memoryview(mmap.mmap(-1, count * step_bytes))
        if not (whole and read_or_fill(fd, memory, self._at(first), 0)):
            for i in range(count):
                page = memory[i * step_bytes : i * step_bytes + HEADER_BYTES]
                read_or_fill(fd, page, self._at(first + i), 0)
        slots = np.frombuffer(memory, np.uint8).reshape(count, step_bytes)
        return np.ascontiguousarray(slots[:, :HEADER_BYTES])


def _records_of(headers: NDArray[np.uint8]) -> tuple[NDArray[np.void], set[bytes]]:
    """What headers tell, and the bytes of their owners."""
    fields = headers.view(HEADER_FIELDS)[:, 0]
    is_block = (fields["magic"] == MAGIC) & (fields["version"] == VERSION)
    for i in np.flatnonzero(is_block).tolist():
        is_block[i] = has_right_checksum(memoryview(headers[i]))
    blocks = fields[is_block]
    found = np.zeros(len(blocks), RECORD)
    for name in ("key", "parent", "sequence", "payload_bytes", "written_ms", "part"):
        found[name] = blocks[name]
    raw = [each.tobytes() for each in blocks["owner"]]
    numbers = {each: owner_number(each) for each in set(raw)}
    found["owner"] = [numbers[each] for each in raw]
    records = np.zeros(len(fields), RECORD)
    records[is_block] = found
    return records, set(numbers)
