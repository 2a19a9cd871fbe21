"""Logs are put aside while their process goes on writing."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

from launch.cluster.console import LogFollower
from launch.cluster.log_files import LogFile

WRITER = "import sys\nfor line in sys.stdin: print(line, end='', flush=True); sys.stderr.write('.')"


def test_a_large_log_is_put_aside_and_its_process_goes_on(tmp_path: Path):
    path = tmp_path / "p0.log"
    one = LogFile(path, bytes_max=100, kept=2)
    follower = LogFollower(path, "info")
    with path.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.PIPE,
        )
    assert process.stdin is not None and process.stderr is not None

    def write(words: str) -> None:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(f"INFO {words}\n".encode())
        process.stdin.flush()
        assert process.stderr.read(1) == b"."

    seen = []
    for run in ("first", "second", "third"):
        write(f"{run} small")
        one.trim()
        write(f"{run} {'x' * 100}")
        seen += [line.split()[1] for line in follower.new_lines()]
        one.trim()
        assert follower.new_lines() == []
    process.stdin.close()
    process.wait(10)
    process.stderr.close()
    assert path.read_bytes() == b""
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["p0.log", "p0.log.1", "p0.log.2"]
    assert [(tmp_path / n).read_text().split()[1] for n in names[1:]] == ["third", "second"]
    assert all(len((tmp_path / n).read_text().splitlines()) == 2 for n in names[1:])
    assert seen == ["first", "first", "second", "second", "third", "third"]


def test_the_last_runs_log_stays_and_is_closed_to_others(tmp_path: Path):
    path = tmp_path / "p0.log"
    for run in ("one", "two", "three"):
        path.write_text(run)
        path.chmod(0o644)
        LogFile(path, bytes_max=0, kept=2).begin()
    kept = [tmp_path / "p0.log.1", tmp_path / "p0.log.2"]
    assert [p.read_text() for p in kept] == ["three", "two"] and not path.exists()
    assert [p.stat().st_mode & 0o777 for p in kept] == [0o600, 0o600]


def test_a_full_disk_costs_no_log_that_was_put_aside(tmp_path: Path, monkeypatch, caplog):
    path = tmp_path / "p0.log"
    one = LogFile(path, bytes_max=100, kept=2)
    for run in ("one", "two"):
        path.write_text(run * 100)
        one.trim()
    kept = [tmp_path / "p0.log.1", tmp_path / "p0.log.2"]
    assert {p.stat().st_mode & 0o777 for p in kept} == {0o600}
    path.write_text("three" * 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))  # as far as a file may grow
    try:
        one.trim()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "not put aside" in caplog.text
    assert [p.read_text()[:3] for p in (path, *kept)] == ["thr", "two", "one"]
    assert sorted(tmp_path.iterdir()) == [path, *kept]


def test_zero_bytes_put_nothing_aside(tmp_path: Path, caplog):
    path = tmp_path / "p0.log"
    LogFile(path, bytes_max=1, kept=1).trim()
    assert not caplog.records, "its process has not begun"
    path.write_text("x" * 1000)
    LogFile(path, bytes_max=0, kept=1).trim()
    assert path.stat().st_size == 1000
