"""The control group (v2) that tells the low class's senders from all others.

A socket belongs to the group that its process was in when it was opened, so a process must
be in the group before it opens one: the launcher puts it there as it starts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

NFT_ROOT = Path("/sys/fs/cgroup")
"""nft looks for the names in its rules below this folder."""


def mount_point(mounts: Path = Path("/proc/self/mounts")) -> Path | None:
    """Where cgroup v2 is mounted: alone, or beside v1; None if it is not."""
    for line in mounts.read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    return None


def find(name: str) -> Path | None:
    """The folder of the group, if it exists."""
    root = mount_point()
    return root / name if root is not None and (root / name).is_dir() else None


@contextlib.contextmanager
def entry(name: str) -> Iterator[int | None]:
    """What :func:`join` takes; None if there is no such group, or no right to enter it."""
    folder = find(name) if name else None
    file = None
    if folder is not None:
        with contextlib.suppress(OSError):
            file = os.open(folder / "cgroup.procs", os.O_WRONLY)
    try:
        yield file
    finally:
        if file is not None:
            os.close(file)


def join(entry: int) -> None:
    """Put the calling process into the group; it stays where it is without the right to."""
    with contextlib.suppress(OSError):
        os.write(entry, b"0")


def members(folder: Path) -> list[int]:
    """Process ids in the group itself."""
    return [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]


def remove(folder: Path) -> bool:
    """Whether the group is gone: one that has processes in it stays."""
    with contextlib.suppress(FileNotFoundError):
        try:
            folder.rmdir()
        except OSError:
            return False
    return True
