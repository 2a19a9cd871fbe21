"""``python -m benchmarks.faults.supervise FOLDER``: a cluster's supervisor as a process that can
be ended itself. FOLDER has the pickled ``records``; what happens goes to ``supervisor.jsonl``."""

from __future__ import annotations

import asyncio
import pickle
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import msgspec

from launch.cluster.process_record import ProcessRecord
from launch.cluster.supervisor import Supervisor

RECORDS, EVENTS = "records", "supervisor.jsonl"
START_TIMEOUT_S = 240.0
BACKOFF_MAX_S = 2.0


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of ``supervisor.jsonl``; ``time_s`` is the monotonic clock's, of all processes."""

    time_s: float
    what: str
    """"ready", "serving", "restarting" or "stopping"."""
    name: str = ""
    reason: str = ""


class _Writer:
    """The supervisor's reporter."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def ready(self, name: str, seconds: float) -> None:
        self._write("ready", name, f"after {seconds:.0f} s")

    def waiting(self, names: Sequence[str], seconds: float) -> None:
        pass

    def serving(self) -> None:
        self._write("serving")

    def restarting(self, name: str, reason: str, delay_s: float) -> None:
        self._write("restarting", name, reason)

    def stopping(self, reason: str) -> None:
        self._write("stopping", reason=reason)

    def _write(self, what: str, name: str = "", reason: str = "") -> None:
        event = Event(time.monotonic(), what, name, reason)
        self._file.write(msgspec.json.encode(event) + b"\n")
        self._file.flush()


def main(folder: Path) -> None:
    records: list[ProcessRecord] = pickle.loads((folder / RECORDS).read_bytes())
    with (folder / EVENTS).open("ab") as file:
        writer = _Writer(file)
        supervisor = Supervisor(records, folder, writer, START_TIMEOUT_S, BACKOFF_MAX_S)
        asyncio.run(supervisor.run())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
