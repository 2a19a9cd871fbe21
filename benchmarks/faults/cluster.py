"""The cluster under faults: its supervisor is a child of ours, each node a namespace."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

from benchmarks.clients.operator import Operator
from benchmarks.faults import supervise
from benchmarks.faults.supervise import Event
from benchmarks.own_cluster import ClusterFailed, name_of, tail
from common.user_files import write_private
from launch.cluster.process_record import ProcessRecord
from launch.rollout.own_cluster import stop

SUPERVISOR = "supervisor"
SERVE_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 20.0


class Cluster:
    """``start``, use, ``close``. Every process has a name: an agent's, an engine's, ``gateway``,
    ``supervisor``, or a part of an engine's session: ``p0/scheduler``, ``p0/detokenizer``."""

    def __init__(self, records: Sequence[ProcessRecord], url: str, folder: Path) -> None:
        self.records = {record.name: record for record in records}
        self.folder = folder
        self.operator = Operator(url)
        self._process: subprocess.Popen[bytes] | None = None
        write_private(folder / supervise.RECORDS, pickle.dumps(list(records)))
        (folder / supervise.EVENTS).touch()

    def names(self, kind: str) -> list[str]:
        return [record.name for record in self.records.values() if record.kind == kind]

    # ---- life ---------------------------------------------------------------------------

    def start(self) -> None:
        """Returns at once; see :meth:`wait_whole`."""
        with (self.folder / "supervisor.log").open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", supervise.__name__, str(self.folder)],
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    async def close(self) -> None:
        await self.operator.close()
        if self._process is not None:
            self.signal(SUPERVISOR, signal.SIGCONT)
            stop(self._process, STOP_TIMEOUT_S)

    async def wait_whole(self, timeout_s: float = SERVE_TIMEOUT_S, since_s: float = 0.0) -> None:
        """Until the gateway has heard from every agent and engine after ``since_s``."""
        wanted = {*self.names("agent"), *self.names("engine")}
        deadline = time.monotonic() + timeout_s
        while await self.operator.heard(since_s) != wanted:
            if self._process is not None and self._process.poll() is not None:
                raise ClusterFailed(
                    f"the supervisor ended:\n{tail(self.folder / 'supervisor.log')}"
                )
            if time.monotonic() > deadline:
                missing = wanted - await self.operator.heard(since_s)
                raise ClusterFailed(f"not there after {timeout_s:g} s: {sorted(missing)}")
            await asyncio.sleep(0.25)

    def events(self) -> list[Event]:
        """All that the supervisors have said."""
        lines = (self.folder / supervise.EVENTS).read_bytes().splitlines()
        return [msgspec.json.decode(line, type=Event) for line in lines]

    # ---- processes ----------------------------------------------------------------------

    def pids(self, name: str) -> list[int]:
        """Of a process and all that it has started; of a part of an engine, that one's."""
        if self._process is None:
            return []
        if name == SUPERVISOR:
            return [self._process.pid]
        owner, _, part = name.partition("/")
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._process.pid).children():
                if name_of(child) == owner:
                    family = [child, *child.children(recursive=True)]
                    return [p.pid for p in family if not part or part in _title(p)]
        return []

    def all_pids(self) -> dict[str, list[int]]:
        names = [SUPERVISOR, *self.records]
        return {name: self.pids(name) for name in names}

    def signal(self, name: str, number: signal.Signals) -> list[int]:
        """To every process of that name; the ids of those that were there."""
        sent = []
        for pid in self.pids(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                sent.append(pid)
        return sent

    async def wait_gone(self, pids: Sequence[int]) -> None:
        """Until these have ended; a zombie has."""
        while any(psutil.pid_exists(pid) and not _is_zombie(pid) for pid in pids):
            await asyncio.sleep(0.05)

    def resume(self, pids: Sequence[int]) -> None:
        """Those of them that are still there."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    async def serve_again(self) -> None:
        """After the supervisor was killed, and its children with it: start it until it serves, as
        a service manager does. It ends where another fault ends what it is just starting."""
        assert self._process is not None
        served = self._times_served()
        while self._times_served() == served:
            if self._process.poll() is not None:
                self.start()
            await asyncio.sleep(0.25)

    def _times_served(self) -> int:
        return sum(event.what == "serving" for event in self.events())


def _is_zombie(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
