"""What the tests of rollout jobs share: inputs, runs, and what they left."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from launch.rollout.__main__ import main

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
TIMINGS = ("started_at", "seconds", "turns")


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def text_rows(count: int) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "prompt": f"prompt {i}", "answer": i} for i in range(count)]


def argv(source: Path, output: Path, url: str, *flags: str) -> list[str]:
    return ["--input", str(source), "--output", str(output), "--endpoint", url, *flags]


def run(source: Path, output: Path, url: str, *flags: str) -> int:
    return main(argv(source, output, url, *flags))


def start(source: Path, output: Path, url: str, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.rollout", *argv(source, output, url, *flags)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def samples(output: Path) -> list[dict[str, Any]]:
    """Every row of every shard, in order of row and sample."""
    tables = [pq.read_table(shard) for shard in sorted(output.glob("*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    return sorted(rows, key=lambda row: (row["row"], row["sample"]))


def what_was_sampled(output: Path) -> list[dict[str, Any]]:
    """The samples without the times that they took."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in samples(output)]


def keys(output: Path) -> list[tuple[int, int]]:
    return [(row["row"], row["sample"]) for row in samples(output)]


def errors(output: Path) -> list[dict[str, Any]]:
    text = (output / "_job" / "errors.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def summary(output: Path) -> dict[str, Any]:
    return json.loads((output / "_job" / "summary.json").read_text())


def wait_until(holds: Callable[[], bool], timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def dropped(output: Path) -> list[dict[str, Any]]:
    text = (output / "_job" / "groups" / "dropped").read_text()
    return [json.loads(line) for line in text.splitlines()]


def kept(output: Path) -> list[dict[str, Any]]:
    """Samples that are there for a later run."""
    path = output / "_job" / "groups" / "kept"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
