"""Blocks as files in a directory of a local disk; docs/block_format.md has the layout."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from storage.block import BlockKey
from storage.block_format import (
    HEADER_BYTES,
    UnknownVersion,
    encode_header,
    key_of_name,
    object_name,
    verify,
)
from storage.io_threads import IoThreads
from storage.queued_tier import QueuedTier
from storage.tier import BlockCorrupt, BlockMissing, TierFull, TierName, Wake
from storage.tier_operation import Operation

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DirectoryLocked(Exception):
    """Another process uses the directory."""

    def __init__(self, directory: Path, owner: str) -> None:
        super().__init__(
            f"SSD directory {directory} is in use by process {owner or 'unknown'}: "
            "stop that process, or give each agent a directory of its own"
        )
        self.directory = directory
        self.owner = owner


class DirectoryUnusable(Exception):
    """Blocks cannot be kept in the directory."""

    def __init__(self, directory: Path, error: OSError) -> None:
        super().__init__(
            f"cannot keep blocks in SSD directory {directory}: {error.strerror or error}; "
            "choose a directory on a local disk that this user may write to"
        )
        self.directory = directory
        self.error = error


class SsdTier(QueuedTier):
    """One file a block, read straight into the caller's buffer, evicted least recently used.

    A block is acknowledged once it would survive a power cut. Blocks of an earlier
    process are found again at start, by name and size; their bytes are verified when
    read. Raises :class:`DirectoryLocked` or :class:`DirectoryUnusable`.
    """

    # the directory is this process's own: nobody else will read another format version
    removed_on = (BlockCorrupt, UnknownVersion)

    def __init__(
        self, directory: str | Path, capacity_bytes: int, on_wake: Wake, threads: int = 8
    ) -> None:
        self._root = Path(directory)
        try:
            self._lock_file = self._prepare()
        except OSError as error:
            raise DirectoryUnusable(self._root, error) from error
        # writes sync, and so take long: with threads of their own they do not delay reads
        readers = IoThreads("ssd-read", threads)
        writers = IoThreads("ssd-write", max(1, threads // 2))
        super().__init__(TierName.SSD, on_wake, readers, writers, capacity_bytes)
        try:
            self._restore()
        except OSError as error:
            self.close()
            raise DirectoryUnusable(self._root, error) from error

    def close(self) -> None:
        super().close()
        self._lock_file.close()

    # ---- start ----------------------------------------------------------------------

    def _prepare(self) -> IO[str]:
        """Make the folders and take the lock, which lasts as long as the returned file."""
        self._root.mkdir(parents=True, exist_ok=True)
        lock_file = open(self._root / "lock", "a+")
        try:
            self._lock(lock_file)
            (self._root / "tmp").mkdir(exist_ok=True)
            for left_over in os.scandir(self._root / "tmp"):
                os.unlink(left_over.path)
            for fan_out in range(256):
                (self._root / "blocks" / f"{fan_out:02x}").mkdir(parents=True, exist_ok=True)
            _sync_directory(self._root / "blocks")
            _sync_directory(self._root)
        except BaseException:
            lock_file.close()
            raise
        return lock_file

    def _lock(self, lock_file: IO[str]) -> None:
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock_file.seek(0)
            raise DirectoryLocked(self._root, lock_file.read()) from error
        lock_file.truncate(0)
        lock_file.write(str(os.getpid()))
        lock_file.flush()

    def _restore(self) -> None:
        """Index the files of an earlier process, the oldest ones evicted to the capacity."""
        found: list[tuple[float, BlockKey, int]] = []
        for fan_out in range(256):
            for entry in os.scandir(self._root / "blocks" / f"{fan_out:02x}"):
                key = key_of_name(entry.name)
                if key is not None:
                    status = entry.stat()
                    found.append((status.st_mtime, key, status.st_size))
        room_bytes = self._stats.capacity_bytes
        kept: list[tuple[BlockKey, int]] = []
        for _, key, stored_bytes in sorted(found, reverse=True):
            room_bytes -= stored_bytes
            if room_bytes >= 0:
                kept.append((key, stored_bytes))
            else:
                self._remove(key)
                self._stats.evicted_blocks_total += 1
        for key, stored_bytes in reversed(kept):
            self._index[key] = stored_bytes
            self._stats.used_bytes += stored_bytes

    # ---- one block, in an I/O thread -------------------------------------------------

    def _path(self, key: BlockKey) -> Path:
        return self._root / object_name(key)

    def _load(self, operation: Operation) -> None:
        header = bytearray(HEADER_BYTES)
        try:
            fd = os.open(self._path(operation.key), os.O_RDONLY)
        except FileNotFoundError as error:
            raise BlockMissing("the file is gone") from error
        try:
            _read_fully(fd, [memoryview(header), operation.buffer])
        except OSError as error:
            if error.errno == errno.EIO:
                raise BlockCorrupt("the disk cannot read the file") from error
            raise
        finally:
            os.close(fd)
        verify(header, operation.buffer, operation.key)

    def _store(self, operation: Operation) -> None:
        path = self._path(operation.key)
        temporary = self._root / "tmp" / path.name
        header = memoryview(encode_header(operation.key, operation.buffer))
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                _write_fully(fd, [header, operation.buffer])
                os.fdatasync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, path)
            _sync_directory(path.parent)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno in _NO_ROOM:
                raise TierFull(f"{self._root}: {error.strerror}") from error
            raise

    def _remove(self, key: BlockKey) -> None:
        self._path(key).unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_fully(fd: int, buffers: Sequence[memoryview]) -> None:
    """Fill all buffers from the file's start; BlockCorrupt if it is shorter."""
    rest, offset = list(buffers), 0
    while rest:
        count = os.preadv(fd, rest, offset)
        if count == 0:
            raise BlockCorrupt(f"the file ends after {offset} bytes")
        offset += count
        rest = _skip(rest, count)


def _write_fully(fd: int, buffers: Sequence[memoryview]) -> None:
    rest, offset = list(buffers), 0
    while rest:
        count = os.pwritev(fd, rest, offset)
        offset += count
        rest = _skip(rest, count)


def _skip(buffers: list[memoryview], count: int) -> list[memoryview]:
    """The buffers without their first ``count`` bytes."""
    while buffers and count >= buffers[0].nbytes:
        count -= buffers[0].nbytes
        buffers = buffers[1:]
    return [buffers[0][count:], *buffers[1:]] if count else buffers
