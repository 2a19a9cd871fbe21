"""Host memory for blocks: anonymous, populated at once, in huge pages where there are any."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

_PAGE_BYTES = 4096
_HUGE_PAGE_BYTES = 2 << 20
_MEMINFO = Path("/proc/meminfo")


class NotEnoughMemory(Exception):
    """The host cannot back the memory that was asked for."""

    def __init__(self, size_bytes: int, available_bytes: int) -> None:
        super().__init__(
            f"{size_bytes / 2**30:.2f} GiB of DRAM were asked for, but only "
            f"{available_bytes / 2**30:.2f} GiB are available: choose a smaller --dram-bytes"
        )
        self.size_bytes = size_bytes
        self.available_bytes = available_bytes


class HostMemory:
    """``size_bytes`` (rounded up to whole pages) of memory that is really there.

    A memfd, so that it can be shared with other processes; populated now, so that no page
    fault happens under a transfer. Raises :class:`NotEnoughMemory`.
    """

    def __init__(self, size_bytes: int) -> None:
        self._fd, self.page_bytes, self._map = _huge_pages(size_bytes) or _plain_pages(size_bytes)
        self.size_bytes = len(self._map)
        self._array = np.frombuffer(self._map, np.uint8)
        self.address = int(self._array.ctypes.data)

    @property
    def view(self) -> memoryview:
        """All bytes, writable."""
        return memoryview(self._map)

    def close(self) -> None:
        """Give the descriptor back; the memory goes with its last view."""
        os.close(self._fd)


def _huge_pages(size_bytes: int) -> tuple[int, int, mmap.mmap] | None:
    """None if the host has not set aside enough huge pages."""
    if _meminfo_bytes("HugePages_Free") * _HUGE_PAGE_BYTES < size_bytes:
        return None
    try:
        fd = os.memfd_create("dualpath", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    except OSError:
        return None
    try:
        return fd, _HUGE_PAGE_BYTES, _map(fd, size_bytes, _HUGE_PAGE_BYTES)
    except OSError:
        os.close(fd)
        return None


def _plain_pages(size_bytes: int) -> tuple[int, int, mmap.mmap]:
    available_bytes = _meminfo_bytes("MemAvailable")
    # The kernel would end some process instead of telling us.
    if size_bytes > available_bytes:
        raise NotEnoughMemory(size_bytes, available_bytes)
    fd = os.memfd_create("dualpath", os.MFD_CLOEXEC)
    try:
        return fd, _PAGE_BYTES, _map(fd, size_bytes, _PAGE_BYTES)
    except OSError as error:
        os.close(fd)
        raise NotEnoughMemory(size_bytes, available_bytes) from error


def _map(fd: int, size_bytes: int, page_bytes: int) -> mmap.mmap:
    size_bytes = -(-size_bytes // page_bytes) * page_bytes
    os.ftruncate(fd, size_bytes)
    return mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def _meminfo_bytes(field: str) -> int:
    """A line of /proc/meminfo in bytes (a plain number where the line has no unit)."""
    for line in _MEMINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            number, *unit = value.split()
            return int(number) * (1024 if unit else 1)
    return 0
