"""A folder for temporary files that goes with its process: at the process's end or, where it was
killed, at the next start of one like it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from common.process_settings import SHARED_MEMORY
from common.user_files import private

_PREFIX = "dualpath-"
_OWNER = "owner"
"""Locked for as long as the process that made the folder lives: the kernel unlocks it."""
_SHARED_FOLDER = Path("/dev/shm")


class Scratch:
    """Makes the folder, and removes what killed ones of this user have left."""

    def __init__(self) -> None:
        _remove_leftovers()
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        new = self.folder / f"{_OWNER}.new"
        self._owner = open(new, "xb", opener=private)  # noqa: SIM115 - the lock's life is ours
        fcntl.flock(self._owner, fcntl.LOCK_EX)
        new.rename(self.folder / _OWNER)

    def note_shared_memory(self, names: Iterable[Path]) -> None:
        """Files in ``/dev/shm`` that go with the folder if this process is killed."""
        with open(self.folder / SHARED_MEMORY, "ab", opener=private) as file:
            file.write(b"".join(os.fsencode(path.name) + b"\n" for path in names))

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._owner.close()


def _remove_leftovers() -> None:
    for owner in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError), owner.open("rb") as file:  # another user's, or in use
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for noted in owner.parent.glob(f"{SHARED_MEMORY}*"):
                for path in shared_memory_in(noted):
                    path.unlink(missing_ok=True)
            shutil.rmtree(owner.parent, ignore_errors=True)


def shared_memory_in(noted: Path) -> set[Path]:
    """What a list names, of ``/dev/shm`` alone; nothing, if there is no such list."""
    names = os.fsdecode(noted.read_bytes()).splitlines() if noted.exists() else []
    return {_SHARED_FOLDER / Path(name).name for name in names}
