"""Temporary files go with their process, also when it is killed."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from launch.scratch import Scratch

LIVES = """
import sys
from pathlib import Path
from launch.scratch import Scratch
scratch = Scratch()
(scratch.folder / "secret").write_text("x")
scratch.note_shared_memory([Path(name) for name in sys.argv[1:]])
print(scratch.folder, flush=True)
sys.stdin.read()
scratch.remove()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


@pytest.fixture
def shared():
    path = Path("/dev/shm") / f"dualpath-test-{uuid.uuid4().hex}"
    path.write_bytes(b"x")
    yield path
    path.unlink(missing_ok=True)


def started(*names: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LIVES, *map(str, names)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline()
    return process


def test_what_a_killed_process_left_goes_at_the_next_start(temporary: Path, shared: Path):
    killed = started(shared)
    killed.kill()
    killed.communicate(timeout=30)
    assert shared.exists() and len(list(temporary.iterdir())) == 1
    scratch = Scratch()
    assert not shared.exists() and list(temporary.iterdir()) == [scratch.folder]
    scratch.remove()
    assert not list(temporary.iterdir())


def test_what_others_have_stays(temporary: Path, shared: Path):
    """Of a process that lives; and folders that are not of this kind."""
    (temporary / "dualpath-notes").mkdir()
    living = started(shared)
    Scratch().remove()
    assert shared.exists() and len(list(temporary.iterdir())) == 2
    living.communicate("", timeout=30)
    assert [path.name for path in temporary.iterdir()] == ["dualpath-notes"]


def test_nothing_outside_of_shared_memory_is_removed(temporary: Path, tmp_path: Path):
    kept = tmp_path / "kept"
    kept.write_text("x")
    killed = started(Path("..") / kept)
    killed.kill()
    killed.communicate(timeout=30)
    Scratch().remove()
    assert kept.exists()
