"""What runs on a host: a child that gets its secret, and ends with its parent. Without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launch.ray.commands import SECRET_FILE, HostCommand
from launch.ray.host_process import HostProcess

TIMEOUT_S = 30
SECRET = "s" * 64
CHILD = """
import signal, sys, time
print("secret of", len(open(sys.argv[1]).read()), "letters", flush=True)
signal.signal(signal.SIGTERM, lambda *_: (print("drains", flush=True), sys.exit(0)))
time.sleep(600)
"""
PARENT = """
import os, sys, time
from launch.ray.commands import HostCommand
from launch.ray.host_process import HostProcess
process = HostProcess(HostCommand("d0", 0, "child", ["{secret-file}"], []), "s" * 64, os.environ)
while "secret of" not in process.said():
    time.sleep(0.05)
print(process.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """In which ``python -m child`` is CHILD."""
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = f"{tmp_path}{os.pathsep}{Path(__file__).parents[3]}"
    return {**os.environ, "PYTHONPATH": path}


def started(environment: dict[str, str]) -> HostProcess:
    return HostProcess(HostCommand("d0", 0, "child", [SECRET_FILE], []), SECRET, environment)


def until(holds: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def heard(process: HostProcess, words: str) -> str:
    said = ""

    def there() -> bool:
        nonlocal said
        said += process.said()
        return words in said

    until(there)
    return said


def test_it_gets_the_secret_and_drains(environment):
    process = started(environment)
    heard(process, f"secret of {len(SECRET)} letters\n")
    command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    assert SECRET.encode() not in command and process.poll() is None
    process.end()
    heard(process, "drains\n")
    until(lambda: process.poll() == 0)


def test_another_of_its_name_waits_until_it_has_ended(environment):
    first = started(environment)
    heard(first, "secret of")
    second = started(environment)
    assert second.poll() is None and second.waits
    first.end(at_once=True)
    until(lambda: first.poll() == -signal.SIGKILL)
    until(lambda: second.poll() is None and not second.waits)
    heard(second, "secret of")
    second.end(at_once=True)
    until(lambda: second.poll() is not None)


def test_one_that_waits_and_is_to_end_is_never_started(environment):
    first, second = started(environment), started(environment)
    second.end()
    assert second.poll() == 0 and second.pid is None
    first.end(at_once=True)
    until(lambda: first.poll() is not None)
    assert second.poll() == 0 and second.pid is None


def test_it_drains_when_its_parent_is_killed(environment):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], env=environment, stdout=subprocess.PIPE, text=True
    )
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait(TIMEOUT_S)
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    parent.stdout.close()
