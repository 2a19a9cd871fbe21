"""What ended processes leave in /dev/shm is removed; what others have there is not."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from common.ids import Incarnation
from common.process_settings import RUN_FOLDER
from launch.cluster import child
from launch.cluster.child import Child, end_sessions
from launch.cluster.process_record import HealthCheck, ProcessRecord

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

READER = """
import mmap, sys, time
files = [open(path) for path in sys.argv[1:]]
maps = [mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) for file in files]
print(flush=True)
time.sleep(600)
"""

MAKER = """
import os, time
from common.process_settings import shared_memory_of
session = os.getsid(0)
name = f"dualpath-test-{session}"
shared_memory_of(session, os.environ["DUALPATH_RUN_FOLDER"]).write_text(name + "\\n")
open(f"/dev/shm/{name}", "x").close()
time.sleep(600)
"""


async def test_a_model_in_memory_outlives_the_engines_that_have_mapped_it(monkeypatch) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        below, older, own = Path(folder) / "weights", Path(f"{folder}-older"), Path(f"{folder}-own")
        for path in (below, older, own):
            path.write_bytes(b"x")
        monkeypatch.setattr(child, "_THERE_BEFORE", {older.name, below.parent.name})
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


async def test_what_is_noted_before_it_is_made_goes_with_whoever_is_killed_at_once(
    tmp_path,
) -> None:
    argv = (sys.executable, "-c", MAKER)
    record = ProcessRecord("p0", "engine", argv, {}, "", {}, (), HealthCheck("http", ""))
    started = Child(record, tmp_path / "log", {RUN_FOLDER: str(tmp_path)}, Incarnation(1))
    made = Path("/dev/shm") / f"dualpath-test-{started.session}"
    async with asyncio.timeout(30):
        while not made.exists():
            await asyncio.sleep(0.01)
    os.kill(started.session, signal.SIGKILL)
    assert await started.exited_within(30) and made.exists()
    started.remove_shared_memory()
    assert not made.exists() and not list(tmp_path.glob("shared-memory*"))
