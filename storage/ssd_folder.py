"""The folder of one SSD device: its lock, and whether an earlier process's tables are right."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
from pathlib import Path

import msgspec

from storage.direct_io import PAGE_BYTES, sync_folder
from storage.folder_notes import FolderNotes

logger = logging.getLogger(__name__)

FORMAT = 3
"""Of slabs and tables; format 1 had a file for each block, 2 no owners and parents."""


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

    def __init__(self, directory: Path, reason: str) -> None:
        super().__init__(
            f"cannot keep blocks in SSD directory {directory}: {reason}; "
            "choose a directory on a local disk that this user may write to"
        )
        self.directory = directory
        self.reason = reason


class _State(msgspec.Struct, frozen=True):
    format: int
    boot_id: str
    """Of the machine when the tables were last known to be right."""
    is_closed: bool
    """The tables were synced, and nothing was written since."""


class SsdFolder:
    """Locked until :meth:`unlock`. Raises :class:`DirectoryLocked`, or DirectoryUnusable for
    an older format; OSError where the folder cannot be made or written to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes = FolderNotes(path)
        path.mkdir(parents=True, exist_ok=True)
        self._lock_file = open(path / "lock", "a+")
        try:
            self._lock()
            if (path / "blocks").exists():
                raise DirectoryUnusable(path, "it holds blocks of an older format (delete it)")
            self._state = self._read_state()
            self.direct_flag = self._probe_direct()
        except BaseException:
            self._lock_file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock_file.seek(0)
            raise DirectoryLocked(self.path, self._lock_file.read()) from error
        self._lock_file.truncate(0)
        self._lock_file.write(str(os.getpid()))
        self._lock_file.flush()

    def unlock(self) -> None:
        self._lock_file.close()

    def _probe_direct(self) -> int:
        """``os.O_DIRECT`` if the file system can do it, else 0 and a line in the log."""
        probe, page = self.path / "probe", mmap.mmap(-1, PAGE_BYTES)
        try:
            fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644)
            try:
                os.pwritev(fd, [page], 0)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            logger.warning(
                "SSD directory %s: its file system has no O_DIRECT, so reads and writes go "
                "through the page cache",
                self.path,
            )
            return 0
        finally:
            probe.unlink(missing_ok=True)
        return os.O_DIRECT

    # ---- can the tables be believed? ------------------------------------------------

    def tables_are_right(self) -> bool:
        """Tables go through the page cache: they outlive a process, but not a power cut,
        unless they were synced at the end."""
        state = self._state
        return state is not None and (state.is_closed or state.boot_id == _boot_id())

    def mark(self, is_closed: bool) -> None:
        """The tables are right, for as long as this machine stays up or, closed, for ever."""
        self._state = _State(FORMAT, _boot_id(), is_closed)
        temporary = self.path / "state.new"
        with open(temporary, "wb") as file:
            file.write(msgspec.json.encode(self._state))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.path / "state")
        sync_folder(self.path)

    def _read_state(self) -> _State | None:
        try:
            state = msgspec.json.decode((self.path / "state").read_bytes(), type=_State)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        if state.format != FORMAT:
            raise DirectoryUnusable(
                self.path, f"it has format {state.format}, this program has {FORMAT} (delete it)"
            )
        return state


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
