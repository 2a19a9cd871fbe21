"""The folder of one SSD device: its lock, its format, and whether it has O_DIRECT."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import time
from pathlib import Path

import msgspec

from common.user_files import PRIVATE_FILE, PRIVATE_FOLDER, close_to_others
from storage.ssd.direct_io import PAGE_BYTES, sync_folder
from storage.ssd.notes import FolderNotes

logger = logging.getLogger(__name__)

FORMAT = 4
"""Of slabs; format 1 had a file for each block, 2 no owners and parents, 3 tables in files of
their own."""

LOCK_TIMEOUT_S = 0.1
"""For which a locked folder is tried; whoever only looks at a folder locks it for less."""


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
    """Blocks cannot be kept in the directory; ``advice`` says what to do."""

    def __init__(
        self,
        directory: Path,
        reason: str,
        advice: str = "choose a directory on a local disk that this user may write to",
    ) -> None:
        super().__init__(f"cannot keep blocks in SSD directory {directory}: {reason}; {advice}")
        self.directory = directory
        self.reason = reason


class DiskBroken(DirectoryUnusable):
    """The disk itself says so: another directory on it would be no better."""


FATAL_ERRORS = {errno.EROFS, errno.ENODEV, errno.ENXIO, errno.ESHUTDOWN, errno.ESTALE}
"""What a disk answers with that is gone, or takes nothing any more."""


def unusable(directory: Path, error: OSError) -> DirectoryUnusable:
    """What an error at the start says of the directory."""
    kind = DiskBroken if error.errno in {*FATAL_ERRORS, errno.EIO} else DirectoryUnusable
    return kind(directory, error.strerror or str(error))


class OtherFormat(DirectoryUnusable):
    """Another version of this program wrote the directory."""

    def __init__(self, directory: Path, found: str, age: str) -> None:
        super().__init__(
            directory,
            f"it was written by {age} version (format {found}; this program writes {FORMAT})",
            "delete it, or give another directory: its blocks are a cache and are recomputed",
        )


class FolderState(msgspec.Struct, frozen=True):
    """What the file ``state`` says."""

    format: int


def read_state(folder: Path) -> FolderState | None:
    """None if there is none. Raises :class:`OtherFormat`."""
    if (folder / "blocks").exists():
        raise OtherFormat(folder, "1", "an older")
    if any(folder.glob("*.slots")):
        raise OtherFormat(folder, "2 or 3", "an older")
    try:
        state = msgspec.json.decode((folder / "state").read_bytes(), type=FolderState)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    if state.format != FORMAT:
        age = "an older" if state.format < FORMAT else "a newer"
        raise OtherFormat(folder, str(state.format), age)
    return state


def owner_process(folder: Path) -> str | None:
    """Number of the process that has the folder locked, as text; None if none has.

    Raises OSError where the folder cannot be read.
    """
    try:
        with open(folder / "lock") as file:
            try:
                # shared and for a moment: whoever starts now tries for longer than that
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read() or "unknown"
    except FileNotFoundError:
        return None
    return None


class SsdFolder:
    """Locked until :meth:`unlock`. Raises :class:`DirectoryLocked`, or DirectoryUnusable for
    an older format; OSError where the folder cannot be made or written to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes = FolderNotes(path)
        path.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        if (path / "state").exists() or not any(path.iterdir()):
            close_to_others([path, *path.iterdir()])
        self._lock_file = open(path / "lock", "a+")
        try:
            self._lock()
            if read_state(path) is None:
                self._note_format()
            self.direct_flag = self._probe_direct()
        except BaseException:  # whatever went wrong, nobody holds the lock then
            self._lock_file.close()
            raise

    def _lock(self) -> None:
        end = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > end:
                    self._lock_file.seek(0)
                    raise DirectoryLocked(self.path, self._lock_file.read()) from error
                time.sleep(LOCK_TIMEOUT_S / 10)
        self._lock_file.truncate(0)
        self._lock_file.write(str(os.getpid()))
        self._lock_file.flush()

    def unlock(self) -> None:
        self._lock_file.close()

    def _probe_direct(self) -> int:
        """``os.O_DIRECT`` if the file system can do it, else 0 and a line in the log."""
        probe, page = self.path / "probe", mmap.mmap(-1, PAGE_BYTES)
        try:
            fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT, PRIVATE_FILE)
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

    def _note_format(self) -> None:
        temporary = self.path / "state.new"
        with open(temporary, "wb") as file:
            file.write(msgspec.json.encode(FolderState(FORMAT)))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.path / "state")
        sync_folder(self.path)
