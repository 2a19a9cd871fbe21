"""What ended processes leave in /dev/shm is removed; what others have there is not."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from launch.cluster import child
from launch.cluster.child import end_sessions

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

READER = """
import mmap, sys, time
files = [open(path) for path in sys.argv[1:]]
maps = [mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) for file in files]
print(flush=True)
time.sleep(600)
"""


async def test_a_model_in_memory_outlives_the_engines_that_have_mapped_it(monkeypatch) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        below, older, own = Path(folder) / "weights", Path(f"{folder}-older"), Path(f"{folder}-own")
        for path in (below, older, own):
            path.write_bytes(b"x")
        loaded_at = older.stat().st_ctime
        monkeypatch.setattr(child, "_LOADED_AT", loaded_at)
        for path in (below, own):
            while path.stat().st_ctime <= loaded_at:  # its clock is coarse
                os.utime(path)
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", READER, *map(str, (below, older, own))],
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            assert process.stdout is not None and process.stdout.readline()
            await end_sessions([process.pid], grace_s=0)
            process.wait(10)
            process.stdout.close()
            assert [path.exists() for path in (below, older, own)] == [True, True, False]
        finally:
            older.unlink(missing_ok=True)
            own.unlink(missing_ok=True)
