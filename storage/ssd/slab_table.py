"""The table at the start of a slab: what lies in each slot; docs/storage.md has the bytes."""

from __future__ import annotations

import errno
import mmap
import os
import struct
import threading
from collections.abc import Mapping

import numpy as np
import xxhash
from numpy.typing import NDArray

from common.block import KEY_BYTES, PART_NAME_CHARS_MAX
from storage.ssd.direct_io import PAGE_BYTES, padded, read_or_fill, transfer_fully
from storage.tiers.operation import Operation

_FIXED_BYTES = 2 * KEY_BYTES + 4 * 8
"""Of an entry, before its checksum; the name of a part follows that, where there is one."""
_PART_AT = _FIXED_BYTES + 8
_FIELDS = (
    ("key", f"V{KEY_BYTES}", 0),
    ("parent", f"V{KEY_BYTES}", KEY_BYTES),
    ("sequence", "<u8", 64),
    ("payload_bytes", "<u8", 72),
    ("owner", "<u8", 80),
    ("written_ms", "<u8", 88),
    ("part", f"S{PART_NAME_CHARS_MAX}", _PART_AT),
)
RECORD = np.dtype(
    {
        "names": [name for name, _, _ in _FIELDS],
        "formats": [kind for _, kind, _ in _FIELDS],
        "offsets": [offset for _, _, offset in _FIELDS],
    }
)
"""What an entry says of its slot. Sequence 0: the slot is free. ``owner`` is
:func:`owner_number`."""

ENTRY_BYTES = 128
ENTRIES_PER_PAGE = PAGE_BYTES // ENTRY_BYTES
FREE_ENTRY = bytes(ENTRY_BYTES)
_ENTRY = np.dtype(
    {
        "names": ["record", "checksum"],
        "formats": [RECORD, "<u8"],
        "offsets": [0, _FIXED_BYTES],
        "itemsize": ENTRY_BYTES,
    }
)
_RECORD = struct.Struct(f"<{KEY_BYTES}s{KEY_BYTES}sQQQQ")
_END = struct.Struct(f"<Q{PART_NAME_CHARS_MAX}s{ENTRY_BYTES - RECORD.itemsize}x")
SECTOR_BYTES = 512
"""The least that most disks write; an entry never lies in two."""
_UNREADABLE = 0xFF
"""Takes the place of bytes that the disk does not give; no entry is right with it."""

_digest = xxhash.xxh3_64_intdigest


def owner_number(raw: bytes) -> int:
    """The number by which tables name an owner, from its bytes in a header; never 0."""
    return _digest(raw) or 1


def table_bytes_for(num_slots: int) -> int:
    return padded(num_slots * ENTRY_BYTES)


def encode_entry(slot: int, operation: Operation, owner: int) -> bytes:
    """What the table says of a slot with the operation's block."""
    record = _RECORD.pack(
        operation.key,
        operation.label.parent,
        operation.sequence,
        operation.nbytes,
        owner,
        operation.written_ms,
    )
    part = operation.label.part.encode()
    return record + _END.pack(_digest(record + part, slot), part)


def encode_table(records: NDArray[np.void]) -> bytes:
    """The table with these records, of every slot, without the padding of its last page."""
    entries = np.zeros(len(records), _ENTRY)
    used = np.flatnonzero(records["sequence"])
    entries["record"][used] = records[used]
    entries["checksum"][used] = _checksums(entries, used)
    return entries.tobytes()


def decode_table(raw: bytes | memoryview) -> tuple[NDArray[np.void], NDArray[np.bool_]]:
    """The record of each slot, and which of them are wrong: only the header tells there.

    An entry is believed if its checksum is right, or if it was never written.
    """
    entries = np.frombuffer(raw, _ENTRY)
    written = np.flatnonzero(np.frombuffer(raw, "<u8").reshape(len(entries), -1).any(axis=1))
    is_wrong = np.zeros(len(entries), bool)
    is_wrong[written] = entries["checksum"][written] != _checksums(entries, written)
    records = entries["record"].copy()
    records[is_wrong] = np.zeros((), RECORD)
    return records, is_wrong


def _checksums(entries: NDArray[np.void], slots: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Each is seeded with its slot, so that an entry is right in its own place only."""
    raw, size = entries.view(np.uint8).data, _FIXED_BYTES
    starts = (slots * ENTRY_BYTES).tolist()
    found = [_digest(raw[at : at + size], at // ENTRY_BYTES) for at in starts]
    words = entries.view("<u8").reshape(len(entries), -1)
    names = words[:, _PART_AT // 8] | words[:, _PART_AT // 8 + 1]
    for i in np.flatnonzero(names[slots]).tolist():
        at = starts[i]
        part = bytes(raw[at + _PART_AT : at + RECORD.itemsize]).rstrip(b"\0")
        found[i] = _digest(bytes(raw[at : at + size]) + part, at // ENTRY_BYTES)
    return np.array(found, np.uint64)


class SlabTable:
    """Reads and writes the table in the slab's file: reads pages, and writes sectors, or pages
    where the disk takes nothing less, as O_DIRECT wants it.

    An entry is written before the sync that makes its block durable, and so becomes durable
    with it. Whatever becomes of the other entries of its page when the power goes shows in
    their checksums. May be called by several threads at once; raises OSError.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._page = memoryview(mmap.mmap(-1, PAGE_BYTES))
        self._unit_bytes = SECTOR_BYTES
        self._held: int | None = None
        """The page of the table that ``_page`` has: neighbours are often written in turn."""
        self._lock = threading.Lock()

    def read(self, fd: int) -> tuple[NDArray[np.void], NDArray[np.bool_]]:
        """See :func:`decode_table`; what the disk does not give counts as wrong."""
        memory = memoryview(mmap.mmap(-1, table_bytes_for(self._num_slots)))
        if not read_or_fill(fd, memory, 0, _UNREADABLE):
            for start in range(0, memory.nbytes, PAGE_BYTES):
                read_or_fill(fd, memory[start : start + PAGE_BYTES], start, _UNREADABLE)
        return decode_table(memory[: self._num_slots * ENTRY_BYTES])

    def write(self, fd: int, records: NDArray[np.void]) -> None:
        """All of it. Not durable before the next sync, as :meth:`update`."""
        raw = encode_table(records)
        memory = memoryview(mmap.mmap(-1, table_bytes_for(self._num_slots)))
        memory[: len(raw)] = raw
        with self._lock:
            self._held = None
            transfer_fully(os.pwritev, fd, [memory], 0)

    def update(self, fd: int, entries: Mapping[int, bytes]) -> None:
        """Write the entries of these slots."""
        by_page: dict[int, list[int]] = {}
        for slot in entries:
            by_page.setdefault(slot // ENTRIES_PER_PAGE, []).append(slot)
        with self._lock:
            for page, slots in by_page.items():
                self._hold(fd, page)
                for slot in slots:
                    at = slot % ENTRIES_PER_PAGE * ENTRY_BYTES
                    self._page[at : at + ENTRY_BYTES] = entries[slot]
                self._held = None  # unless the write succeeds
                first, last = min(slots) % ENTRIES_PER_PAGE, max(slots) % ENTRIES_PER_PAGE
                self._write_part(fd, page, first * ENTRY_BYTES, (last + 1) * ENTRY_BYTES)
                self._held = page

    def _write_part(self, fd: int, page: int, start: int, end: int) -> None:
        """Bytes ``start`` to ``end`` of the page, and as little as possible around them."""
        unit = self._unit_bytes
        start, end = start // unit * unit, -(-end // unit) * unit
        try:
            transfer_fully(os.pwritev, fd, [self._page[start:end]], page * PAGE_BYTES + start)
        except OSError as error:
            if error.errno != errno.EINVAL or unit == PAGE_BYTES:
                raise
            self._unit_bytes = PAGE_BYTES
            self._write_part(fd, page, start, end)

    def _hold(self, fd: int, page: int) -> None:
        if self._held != page:
            self._held = None
            read_or_fill(fd, self._page, page * PAGE_BYTES, _UNREADABLE)
            self._held = page
