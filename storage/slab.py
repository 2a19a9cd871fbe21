"""A preallocated file of equal slots, one block each; docs/storage.md has the bytes."""

from __future__ import annotations

import errno
import mmap
import os
import re
import struct
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from storage.block import KEY_BYTES
from storage.block_format import (
    HEADER_BYTES,
    HEADER_FIELDS,
    MAGIC,
    VERSION,
    encode_header,
    has_right_checksum,
)
from storage.direct_io import EndOfFile, Scratch, padded, sync_folder
from storage.tier import BlockCorrupt
from storage.tier_operation import Operation

RECORD = np.dtype(
    [
        ("key", f"V{KEY_BYTES}"),
        ("parent", f"V{KEY_BYTES}"),
        ("sequence", "<u8"),
        ("payload_bytes", "<u8"),
        ("owner", "<u8"),
        ("written_ms", "<u8"),
    ]
)
"""What the table beside a slab says of each slot. Sequence 0: the slot is free.
``owner`` is :func:`owner_number`."""

_RECORD = struct.Struct(f"<{KEY_BYTES}s{KEY_BYTES}sQQQQ")
SEQUENTIAL_SLOT_BYTES_MAX = 32 << 10
"""Slots up to this size are read whole when headers are looked for: that takes a disk less
time than single pages do."""
HEADERS_AT_ONCE = 1024
"""Slots that a scan looks at together."""
_NAME = re.compile(r"(\d{6,})-(\d+)\.slab")
_scratch = Scratch()


def owner_number(raw: bytes) -> int:
    """The number by which tables name an owner, from its bytes in a header; never 0."""
    return xxhash.xxh3_64_intdigest(raw) or 1


def slot_bytes_for(payload_bytes: int) -> int:
    """Size of the slots that hold such payloads."""
    return HEADER_BYTES + padded(payload_bytes)


class _Files(NamedTuple):
    data: int
    table: int


class Written(NamedTuple):
    """A block in its slot that is not durable yet."""

    operation: Operation
    slab: Slab
    slot: int


class Slab:
    """``num_slots`` slots of ``slot_bytes``: a header page and a payload, padded to pages.

    The headers are the truth. A table beside the slab repeats them for a quick start; it
    goes through the page cache, so it survives the end of a process, not a power cut.

    Slots are given out and taken back by the owner's thread. Everything else runs in I/O
    threads, may be called by several at once, and raises OSError. The file is made by the
    first write.
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
        self.is_sync_due = False
        """A thread will look at ``unsynced``."""
        self.sync_lock = threading.Lock()
        """Held by the thread that syncs, so that the others' blocks make one group."""
        self.is_refused = False
        """There was no room to make it; every write fails."""
        self._direct_flag = direct_flag
        self._is_read_only = is_read_only
        self._folder = folder
        self._path = folder / f"{number:06d}-{slot_bytes}.slab"
        self._table_path = self._path.with_suffix(".slots")
        self._files: _Files | None = None
        self._lock = threading.Lock()

    @classmethod
    def found(cls, path: Path, direct_flag: int, is_read_only: bool = False) -> Slab | None:
        """The slab in a file of an earlier process, or to be looked at beside its owner; None
        if the file is something else."""
        match = _NAME.fullmatch(path.name)
        if match is None:
            return None
        slot_bytes = int(match[2])
        if slot_bytes <= HEADER_BYTES or slot_bytes % HEADER_BYTES:
            return None
        num_slots = path.stat().st_size // slot_bytes
        size = slot_bytes, num_slots
        return cls(path.parent, int(match[1]), *size, direct_flag, is_read_only)

    @property
    def nbytes(self) -> int:
        return self.num_slots * self.slot_bytes

    @property
    def is_direct(self) -> bool:
        """Does it go round the page cache?"""
        return bool(self._direct_flag)

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
            return _scratch.read(self._opened().data, slot * self.slot_bytes, payload)
        except EndOfFile as error:
            raise BlockCorrupt(str(error)) from error

    def write(self, slot: int, operation: Operation) -> None:
        """Not durable before :meth:`sync`."""
        header = encode_header(
            *(operation.key, operation.buffer, operation.label),
            *(operation.sequence, operation.written_ms),
        )
        _scratch.write(self._opened().data, slot * self.slot_bytes, header, operation.buffer)

    def sync(self) -> None:
        """What was written so far survives a power cut."""
        os.fdatasync(self._opened().data)

    def record(self, slot: int, operation: Operation, owner: int) -> None:
        """Note a durable block in the table."""
        entry = _RECORD.pack(
            *(operation.key, operation.label.parent, operation.sequence, operation.nbytes),
            *(owner, operation.written_ms),
        )
        os.pwrite(self._opened().table, entry, slot * _RECORD.size)

    def read_whole(self, slot: int, memory: memoryview) -> memoryview:
        """A slot's bytes, header and all, in page-aligned memory of at least that size."""
        part = memory[: self.slot_bytes]
        count = os.preadv(self._opened().data, [part], slot * self.slot_bytes)
        return part[:count]

    def erase(self, slot: int) -> None:
        """Make the slot empty, so that no later start finds what it held."""
        files = self._opened()
        os.pwrite(files.table, bytes(RECORD.itemsize), slot * RECORD.itemsize)
        _scratch.write(files.data, slot * self.slot_bytes, bytes(HEADER_BYTES), memoryview(b""))

    # ---- start and end --------------------------------------------------------------

    def table(self) -> NDArray[np.void]:
        """The table's records; shape (num_slots,). Zeros where the file ends early."""
        raw = os.pread(self._opened().table, self.num_slots * RECORD.itemsize, 0)
        records = np.zeros(self.num_slots, RECORD)
        whole = np.frombuffer(raw[: len(raw) // RECORD.itemsize * RECORD.itemsize], RECORD)
        records[: len(whole)] = whole
        return records

    def scan(self) -> tuple[NDArray[np.void], set[bytes]]:
        """The records that the headers tell, written to the table as well unless the slab is
        read only; shape (num_slots,). With it, the owners' bytes.

        A slot with another format version or a damaged header, or that cannot be read,
        counts as free.
        """
        files = self._opened()
        records = np.zeros(self.num_slots, RECORD)
        owners: set[bytes] = set()
        for first, headers in self._headers(files.data):
            fields = headers.view(HEADER_FIELDS)[:, 0]
            is_block = (fields["magic"] == MAGIC) & (fields["version"] == VERSION)
            for i in np.flatnonzero(is_block).tolist():
                is_block[i] = has_right_checksum(memoryview(headers[i]))
            blocks = fields[is_block]
            found = np.zeros(len(blocks), RECORD)
            for name in ("key", "parent", "sequence", "payload_bytes", "written_ms"):
                found[name] = blocks[name]
            raw = [each.tobytes() for each in blocks["owner"]]
            numbers = {each: owner_number(each) for each in set(raw)}
            found["owner"] = [numbers[each] for each in raw]
            owners |= numbers.keys()
            records[first : first + len(fields)][is_block] = found
        if not self._is_read_only:
            os.pwrite(files.table, records.tobytes(), 0)
        return records, owners

    def headers(self) -> Iterator[tuple[int, NDArray[np.void]]]:
        """(first slot, fields of headers, as they lie there), from the first slot to the last."""
        for first, headers in self._headers(self._opened().data):
            yield first, headers.view(HEADER_FIELDS)[:, 0]

    def _headers(self, fd: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(first slot, headers of shape (n, HEADER_BYTES)), from the first slot to the last."""
        whole = self.slot_bytes <= SEQUENTIAL_SLOT_BYTES_MAX
        step_bytes = self.slot_bytes if whole else HEADER_BYTES
        memory = memoryview(mmap.mmap(-1, HEADERS_AT_ONCE * step_bytes))
        for first in range(0, self.num_slots, HEADERS_AT_ONCE):
            count = min(HEADERS_AT_ONCE, self.num_slots - first)
            part = memory[: count * step_bytes]
            if not (whole and _read_run(fd, part, first * self.slot_bytes)):
                for i in range(count):
                    page = part[i * step_bytes : i * step_bytes + HEADER_BYTES]
                    _read_or_zero(fd, page, (first + i) * self.slot_bytes)
            slots = np.frombuffer(part, np.uint8).reshape(count, step_bytes)
            yield first, np.ascontiguousarray(slots[:, :HEADER_BYTES])

    def _opened(self) -> _Files:
        files = self._files
        if files is None:
            with self._lock:
                if self.is_refused:
                    raise OSError(errno.ENOSPC, f"no room for {self._path}")
                files = self._files = self._files or self._open()
        return files

    def _open(self) -> _Files:
        """Open the files; make and preallocate them if they are not there yet."""
        is_new = not self._path.exists()
        access = os.O_RDONLY if self._is_read_only else os.O_RDWR | os.O_CREAT
        data = os.open(self._path, access | self._direct_flag, 0o644)
        try:
            table = os.open(self._table_path, access, 0o644)
        except OSError:
            os.close(data)
            raise
        files = _Files(data, table)
        if is_new:
            try:
                self._preallocate(files)
            except OSError:
                self.is_refused = True
                _close(files)
                self._unlink()
                raise
        return files

    def _preallocate(self, files: _Files) -> None:
        os.ftruncate(files.table, 0)
        os.posix_fallocate(files.table, 0, self.num_slots * RECORD.itemsize)
        os.posix_fallocate(files.data, 0, self.nbytes)
        sync_folder(self._folder)

    def close(self, sync_table: bool = False) -> None:
        """No call may be running. ``sync_table``: the table survives a power cut from now on."""
        if self._files is None:
            return
        files, self._files = self._files, None
        try:
            if sync_table:
                os.fsync(files.table)
        finally:
            _close(files)

    def delete(self) -> None:
        """Close and remove the files. No call may be running."""
        self.close()
        self._unlink()

    def _unlink(self) -> None:
        self._path.unlink(missing_ok=True)
        self._table_path.unlink(missing_ok=True)


def _close(files: _Files) -> None:
    os.close(files.data)
    os.close(files.table)


def _read_run(fd: int, memory: memoryview, offset: int) -> bool:
    """Fill the memory from the file; False if the disk cannot read all of it."""
    try:
        return os.preadv(fd, [memory], offset) == memory.nbytes
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return False


def _read_or_zero(fd: int, memory: memoryview, offset: int) -> None:
    """Fill the memory from the file; with zeros if the disk cannot read that."""
    try:
        os.preadv(fd, [memory], offset)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        memory[:] = bytes(memory.nbytes)
