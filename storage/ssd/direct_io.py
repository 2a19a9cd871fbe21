"""File I/O in whole pages, as O_DIRECT wants it, straight from and to a caller's memory."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

PAGE_BYTES = 4096
"""What O_DIRECT wants of addresses, lengths and offsets, on any disk."""


class EndOfFile(Exception):
    """The file is shorter than what was to be read."""


def padded(nbytes: int) -> int:
    """``nbytes`` rounded up to whole pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


class Scratch(threading.local):
    """One page for a header and one for a payload's end in each thread, and more on demand."""

    def __init__(self) -> None:
        pages = memoryview(mmap.mmap(-1, 2 * PAGE_BYTES))
        self.header = pages[:PAGE_BYTES]
        self._tail = pages[PAGE_BYTES:]
        self._bounce = pages[:0]

    def read(self, fd: int, offset: int, payload: memoryview) -> memoryview:
        """Fill ``payload`` from what follows the header page at ``offset``; returns that page.

        The memory is valid until the thread's next call. Raises :class:`EndOfFile`.
        """
        parts, copied = self._parts(payload)
        transfer_fully(os.preadv, fd, [self.header, *parts], offset)
        if copied.nbytes:
            payload[payload.nbytes - copied.nbytes :] = copied
        return self.header

    def write(self, fd: int, offset: int, header: bytes, payload: memoryview) -> None:
        """Write the header page and after it ``payload``, padded with zeros."""
        self.header[:] = header
        parts, copied = self._parts(payload)
        if copied.nbytes:
            copied[:] = payload[payload.nbytes - copied.nbytes :]
            end = parts[-1]
            end[copied.nbytes :] = bytes(end.nbytes - copied.nbytes)
        transfer_fully(os.pwritev, fd, [self.header, *parts], offset)

    def _parts(self, payload: memoryview) -> tuple[list[memoryview], memoryview]:
        """Aligned memory for the payload, as far as possible its own; and the payload's end
        in it, if that is not: to be copied."""
        if not payload.nbytes:
            return [], payload
        address = np.frombuffer(payload, np.uint8).__array_interface__["data"][0]
        own_bytes = payload.nbytes // PAGE_BYTES * PAGE_BYTES if address % PAGE_BYTES == 0 else 0
        rest_bytes = payload.nbytes - own_bytes
        if not rest_bytes:
            return [payload], payload[:0]
        memory = self._tail if rest_bytes < PAGE_BYTES else self._bounced(padded(rest_bytes))
        parts = [payload[:own_bytes], memory] if own_bytes else [memory]
        return parts, memory[:rest_bytes]

    def _bounced(self, nbytes: int) -> memoryview:
        if self._bounce.nbytes < nbytes:
            self._bounce = memoryview(mmap.mmap(-1, nbytes))
        return self._bounce[:nbytes]


class ThreadMemory(threading.local):
    """Page-aligned memory of each thread, as much as it last asked for or more."""

    def __init__(self) -> None:
        self._view = memoryview(b"")

    def of(self, nbytes: int) -> memoryview:
        """At least so much; valid until the thread asks for more."""
        if self._view.nbytes < nbytes:
            self._view = memoryview(mmap.mmap(-1, nbytes))
        return self._view


def read_or_fill(fd: int, memory: memoryview, offset: int, filler: int) -> bool:
    """Read from a file. Where it ends before, or the disk cannot read it, the memory gets the
    byte ``filler``, and the answer is False; other errors are raised as OSError."""
    try:
        count = os.preadv(fd, [memory], offset)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        count = 0
    memory[count:] = bytes([filler]) * (memory.nbytes - count)
    return count == memory.nbytes


def sync_folder(path: Path) -> None:
    """Files made in the folder or removed from it stay so after a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


Call = Callable[[int, Sequence[memoryview], int], int]


def transfer_fully(call: Call, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Repeat ``os.preadv`` or ``os.pwritev`` until all buffers are done.

    Raises :class:`EndOfFile`."""
    rest = list(buffers)
    while rest:
        count = call(fd, rest, offset)
        if count == 0:
            raise EndOfFile(f"the file ends at byte {offset}")
        offset += count
        rest = _skip(rest, count)


def _skip(buffers: list[memoryview], count: int) -> list[memoryview]:
    """The buffers without their first ``count`` bytes."""
    while buffers and count >= buffers[0].nbytes:
        count -= buffers[0].nbytes
        buffers = buffers[1:]
    return [buffers[0][count:], *buffers[1:]] if count else buffers
