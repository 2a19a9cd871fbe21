"""The file of a slab: made by the first call that needs it, preallocated."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

from common.user_files import PRIVATE_FILE
from storage.ssd.direct_io import sync_folder


class SlabFile:
    """``nbytes`` at ``path``. Belongs to I/O threads, several at once; raises OSError."""

    def __init__(self, path: Path, nbytes: int, direct_flag: int, is_read_only: bool) -> None:
        self.path = path
        self.is_direct = bool(direct_flag)
        """Does it go round the page cache?"""
        self.is_read_only = is_read_only
        self.is_refused = False
        """There was no room to make it; every write fails."""
        self._nbytes = nbytes
        self._direct_flag = direct_flag
        self._fd: int | None = None
        self._lock = threading.Lock()

    def opened(self) -> int:
        """Its file descriptor."""
        fd = self._fd
        if fd is None:
            with self._lock:
                if self.is_refused:
                    raise OSError(errno.ENOSPC, f"no room for {self.path}")
                fd = self._fd = self._fd if self._fd is not None else self._open()
        return fd

    def _open(self) -> int:
        """Open the file; preallocate it if it is new, or if its maker was killed before that."""
        access = os.O_RDONLY if self.is_read_only else os.O_RDWR | os.O_CREAT
        fd = os.open(self.path, access | self._direct_flag, PRIVATE_FILE)
        if not self.is_read_only and os.fstat(fd).st_size < self._nbytes:
            try:
                os.posix_fallocate(fd, 0, self._nbytes)
                sync_folder(self.path.parent)
            except OSError:
                self.is_refused = True
                os.close(fd)
                self.path.unlink(missing_ok=True)
                raise
        return fd

    def sync(self) -> None:
        """What was written so far survives a power cut."""
        os.fdatasync(self.opened())

    def close(self) -> None:
        """No call may be running."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def delete(self) -> None:
        """Close and remove the file. No call may be running."""
        self.close()
        self.path.unlink(missing_ok=True)
