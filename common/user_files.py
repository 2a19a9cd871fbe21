"""Files of this user: the cache folder, and what nobody else may read."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger(__name__)

PRIVATE_UMASK = 0o077
"""Of every process of a cluster."""
PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700


def cache_folder() -> Path:
    """``dualpath`` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dualpath"


def keep(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all. In a read-only home there will be none: what it
    would have held is found out again at the next start."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(content)
        temporary.rename(path)
    except OSError:
        return


def close_to_others(paths: Iterable[Path]) -> None:
    """What an earlier version made readable for every user is this user's alone from now on.

    Only for what is certainly ours: somebody may have given a folder such as /tmp.
    """
    for path in paths:
        try:
            mode = stat.S_IMODE(path.lstat().st_mode)
            if mode & PRIVATE_UMASK and not path.is_symlink():
                path.chmod(mode & ~PRIVATE_UMASK)
                log.info("closed to other users: %s", path)
        except OSError as error:
            log.warning("stays open to other users: %s: %s", path, error.strerror)


def private(path: str, flags: int) -> int:
    """An ``opener`` for ``open``: what it makes is this user's alone from its first moment."""
    return os.open(path, flags, PRIVATE_FILE)


def write_private(path: Path, content: bytes) -> None:
    """A file that only this user can read."""
    path.unlink(missing_ok=True)
    with open(path, "xb", opener=private) as file:
        file.write(content)
