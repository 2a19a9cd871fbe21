"""A time of day of its own for a process and its children: off by the seconds in a file of eight
bytes, which may change while they run.

No namespace of Linux has a time of day of its own, a step of the kernel's would be one for the
whole machine, and Debian's libfaketime (0.9.10) breaks sleeps on the monotonic clock. So a small
library is compiled and preloaded, which leaves all other clocks alone.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from benchmarks.own_cluster import ClusterFailed

_SECONDS = struct.Struct("<q")
_SOURCE = Path(__file__).with_suffix(".c")
_LIBRARY = "own_clock.so"
COMPILE_TIMEOUT_S = 60.0


def build(folder: Path) -> None:
    """The library, in ``folder``; raises :class:`ClusterFailed`."""
    command = ["g++", "-x", "c", "-std=gnu11", "-O1", "-shared", "-fPIC", str(_SOURCE), "-ldl"]
    done = subprocess.run(
        [*command, "-o", str(folder / _LIBRARY)],
        capture_output=True,
        text=True,
        timeout=COMPILE_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise ClusterFailed(f"own_clock.c: {done.stderr}")


def environment(folder: Path, file: Path) -> dict[str, str]:
    """Of a process whose time of day is off by what :func:`write_offset` writes to ``file``."""
    return {"LD_PRELOAD": str(folder / _LIBRARY), "OWN_CLOCK": str(file)}


def write_offset(file: Path, seconds: int) -> None:
    """In place: it may be mapped."""
    with file.open("r+b" if file.exists() else "wb") as opened:
        opened.write(_SECONDS.pack(seconds))
