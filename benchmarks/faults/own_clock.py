"""``python -m benchmarks.faults.own_clock FILE MODULE``: runs a module, whose time of day is off by
the seconds in FILE, eight bytes that may change while it runs.

No namespace of Linux has a time of day of its own, a step of the kernel's would be one for the
whole machine, and libfaketime breaks sleeps on the monotonic clock. So Python's own are replaced,
which is all that an agent knows of the time of day.
"""

from __future__ import annotations

import mmap
import runpy
import struct
import sys
import time
from pathlib import Path

_SECONDS = struct.Struct("<q")


def write_offset(file: Path, seconds: int) -> None:
    """In place: it may be mapped."""
    with file.open("r+b" if file.exists() else "wb") as opened:
        opened.write(_SECONDS.pack(seconds))


def main(file: str, module: str) -> None:
    with open(file, "rb") as opened:
        offset = mmap.mmap(opened.fileno(), _SECONDS.size, access=mmap.ACCESS_READ)
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + _SECONDS.unpack(offset[:])[0]
    time.time_ns = lambda: real_ns() + _SECONDS.unpack(offset[:])[0] * 10**9
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
