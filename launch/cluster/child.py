"""One process of a cluster: the leader of a session that can be ended as a whole."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from common.ids import Incarnation
from common.process_settings import INCARNATION, RUN_FOLDER, shared_memory_of
from common.user_files import PRIVATE_UMASK, private
from engine.cpu.fork_server import Forked, ForkServer, Order
from launch.cluster.process_record import ProcessRecord
from launch.scratch import shared_memory_in
from transfer.traffic import cgroup

_PR_SET_PDEATHSIG = 1
_TRACKERS_S = 1.0
_libc = ctypes.CDLL(None)
_SHARED_FOLDER = Path("/dev/shm")
_THERE_BEFORE = frozenset(os.listdir(_SHARED_FOLDER)) if _SHARED_FOLDER.exists() else frozenset()
"""Names of files from before any child was started; a clock may be stepped."""


class Child:
    """Started when built. Output goes straight to ``log``: nothing stalls if we do."""

    def __init__(
        self,
        record: ProcessRecord,
        log: Path,
        env: dict[str, str],
        incarnation: Incarnation,
        forked: Forked | None = None,
    ) -> None:
        self.record = record
        self.log = log
        self.started_at = time.monotonic()
        environment = _environment(record, env, incarnation)
        self._process = forked or _process(record, log, environment)
        self.session = self._process.pid
        self._shared: set[Path] = set()
        self._noted = shared_memory_of(self.session, env.get(RUN_FOLDER, ""))
        self._exited = asyncio.Event()
        self._pidfd = os.pidfd_open(self.session)
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_exit)

    @classmethod
    async def forked(
        cls,
        record: ProcessRecord,
        log: Path,
        env: dict[str, str],
        incarnation: Incarnation,
        forks: ForkServer,
    ) -> Self:
        """One that has imported all that it needs, if that can be."""
        started_at = time.monotonic()
        order = Order(record.argv, _environment(record, env, incarnation))
        with open(log, "ab", opener=private) as output:
            child = cls(record, log, env, incarnation, await forks.fork(order, output))
        child.started_at = started_at
        return child

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self.started_at

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()
        self._exited.set()

    async def exited_within(self, seconds: float) -> bool:
        """Whether the leader has ended; waits for it, up to ``seconds``."""
        if not self._exited.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._exited.wait(), max(0.0, seconds))
        return self._exited.is_set()

    def note_shared_memory(self) -> set[Path]:
        """Remember what its session has mapped, for :meth:`remove_shared_memory`; what is new."""
        new = _named_shared_memory(session_members([self.session])) - self._shared
        self._shared |= new
        return new

    def remove_shared_memory(self) -> None:
        """What the killed have left of it, once nobody of the session is left."""
        if not session_members([self.session]):
            for path in (*self._shared, *shared_memory_in(self._noted), self._noted):
                path.unlink(missing_ok=True)

    def how_it_ended(self) -> str:
        """A sentence part such as ``exited with code 1``."""
        code = self._process.returncode
        if code is None:
            return "is running"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"exited with code {code}"


def _environment(
    record: ProcessRecord, env: Mapping[str, str], incarnation: Incarnation
) -> dict[str, str]:
    return {**os.environ, **env, **record.env, INCARNATION: str(incarnation)}


def _process(
    record: ProcessRecord, log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    launcher = os.getpid()

    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it died before the call above
            os._exit(1)
        if group is not None:
            cgroup.join(group)

    with open(log, "ab", opener=private) as output, cgroup.entry(record.cgroup) as group:
        return subprocess.Popen(
            record.argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=PRIVATE_UMASK,
            preexec_fn=prepare,
        )


def signal_sessions(sessions: Iterable[int], number: signal.Signals) -> bool:
    """Send a signal to every member of these sessions; False if there was none left.

    Not by process group: what a child starts may lead a group of its own.
    """
    members = session_members(sessions)
    for pid in members:
        _signal(pid, number)
    return bool(members)


def session_members(sessions: Iterable[int]) -> list[int]:
    """Living processes (zombies aside) whose session is one of these."""
    wanted = set(sessions)
    members = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path(f"/proc/{entry}/stat").read_text()
        except OSError:  # it ended meanwhile
            continue
        state, _, _, session = stat[stat.rindex(")") + 2 :].split()[:4]
        if int(session) in wanted and state not in "ZX":
            members.append(int(entry))
    return members


async def end_sessions(sessions: Iterable[int], grace_s: float, patience_s: float = 3.0) -> bool:
    """SIGTERM, after ``grace_s`` SIGKILL; True once no member of the sessions is left.

    Shared memory that the members had no time to remove is removed for them.
    """
    sessions = list(sessions)
    shared = _named_shared_memory(session_members(sessions))
    try:
        return await _end_members(sessions, grace_s, patience_s)
    finally:
        for path in shared:
            path.unlink(missing_ok=True)


async def _end_members(sessions: list[int], grace_s: float, patience_s: float) -> bool:
    if grace_s > 0:
        signal_sessions(sessions, signal.SIGTERM)
        # A stopped process acts on SIGTERM only once it runs again.
        signal_sessions(sessions, signal.SIGCONT)
        if await _gone_within(sessions, grace_s):
            return True
    # Python's resource trackers remove what the killed leave, once they see them gone.
    for pid in session_members(sessions):
        if not _is_resource_tracker(pid):
            _signal(pid, signal.SIGKILL)
    await _gone_within(sessions, _TRACKERS_S)
    give_up_at = time.monotonic() + patience_s
    while signal_sessions(sessions, signal.SIGKILL):
        if time.monotonic() > give_up_at:
            return False
        await asyncio.sleep(0.05)
    return True


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _is_resource_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it ended meanwhile
        return False


def _named_shared_memory(pids: Iterable[int]) -> set[Path]:
    """Files in /dev/shm (semaphores too) that these processes have mapped: no folders', and none
    that was there before, such as a model kept in memory."""
    paths = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it ended meanwhile
            maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
            paths |= set(re.findall(r" (/dev/shm/[^/\s]+)$", maps, re.M))
    return {path for path in map(Path, paths) if path.name not in _THERE_BEFORE}


async def _gone_within(sessions: list[int], seconds: float) -> bool:
    give_up_at = time.monotonic() + seconds
    while session_members(sessions):
        if time.monotonic() > give_up_at:
            return False
        await asyncio.sleep(0.1)
    return True
