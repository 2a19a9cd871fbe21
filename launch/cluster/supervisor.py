"""Runs the processes of a cluster: starts, watches, restarts and ends them."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from common.ids import Incarnation
from common.process_settings import RUN_FOLDER, SECRETS
from common.user_files import write_private
from engine.cpu.fork_server import ForkServer
from launch.cluster.child import Child, end_sessions
from launch.cluster.health import Prober
from launch.cluster.ports import respawn
from launch.cluster.process_record import ProcessRecord
from launch.scratch import Scratch

START_PROBE_PERIOD_S = 0.5
NOTE_PERIOD_S = 5.0
"""How often it is noted what shared memory a starting process has: a list of all that it maps."""
PROBE_PERIOD_S = 5.0
SILENT_PROBES_MAX = 6
"""Failed probes in a row (30 s) after which a process is ended. Counted in probes, so
that time in which the launcher itself was suspended does not count."""
BACKOFF_FIRST_S = 0.5
BACKOFF_RESET_S = 60.0
"""A process that lived this long starts again at the shortest back-off."""
STOP_GRACE_S = 4.0
HURRY_LOOK_S = 0.05


class StartFailed(Exception):
    """A process did not become ready at the start of the cluster."""

    def __init__(self, name: str, reason: str, log: Path) -> None:
        super().__init__(f"{name} {reason}")
        self.name = name
        self.log = log


class Start(NamedTuple):
    """What tells one start of a process from all others."""

    incarnation: Incarnation
    """Greater than those of all starts before."""
    turn: int
    """Of its ports, of which it takes others at each start (:func:`respawn`)."""


class Numbers:
    """Numbers the starts of processes, by this host's clock."""

    def __init__(self) -> None:
        self._last = 0

    async def next_start(self, record: ProcessRecord, restarts: int) -> Start:
        """Of a process that is about to start, after so many deaths."""
        self._last = max(self._last + 1, int(time.time() * 1000))
        return Start(Incarnation(self._last), restarts)

    def may_end_for_others(self, record: ProcessRecord) -> bool:
        """Whether it may end because one did that another launcher runs."""
        return False

    async def overtaken(self, record: ProcessRecord, start: Start) -> str:
        """Returns, with the reason, when a process that has begun so has to begin anew."""
        await asyncio.Event().wait()
        return ""


class Reporter(Protocol):
    """Told what happens; the console in the product."""

    def ready(self, name: str, seconds: float) -> None:
        """A process answers all its checks."""

    def waiting(self, names: Sequence[str], seconds: float) -> None:
        """These are not ready yet; called each second until the cluster is."""

    def serving(self) -> None:
        """The whole cluster is ready."""

    def restarting(self, name: str, reason: str, delay_s: float) -> None:
        """A process is gone and will be started again after ``delay_s``."""

    def stopping(self, reason: str) -> None:
        """Everything is about to be ended."""


class Supervisor:
    """Owns one cluster from its first process to its last."""

    def __init__(
        self,
        records: Sequence[ProcessRecord],
        log_folder: Path,
        reporter: Reporter,
        start_timeout_s: float,
        backoff_max_s: float = 15.0,
        numbers: Numbers | None = None,
    ) -> None:
        self._records = records
        self._logs = {record.name: log_folder / f"{record.name}.log" for record in records}
        self._reporter = reporter
        self._start_timeout_s = start_timeout_s
        self._backoff_max_s = backoff_max_s
        self._children: dict[str, Child] = {}
        self._ready = {record.name: asyncio.Event() for record in records}
        self._stop = asyncio.Event()
        self._hurry = False
        self._numbers = numbers or Numbers()
        self._forks = ForkServer()
        self.drain: Callable[[], Awaitable[None]] | None = None
        """Called at the first signal, while all still serve; a second one cuts it short."""

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM; raises :class:`StartFailed` before serving.

        However it ends, none of the processes is left.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        self._scratch = Scratch()
        self._prober = Prober(str(self._scratch.folder))
        watchers = [asyncio.create_task(self._keep_running(each)) for each in self._together()]
        progress = asyncio.create_task(self._report_progress())
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([*watchers, stopped], return_when=asyncio.FIRST_COMPLETED)
            for watcher in watchers:
                if watcher.done():
                    watcher.result()  # raises StartFailed
            if self.drain is not None:
                await self._unless_hurried(self.drain())
        finally:
            await _cancel([*watchers, progress, stopped])
            self._forks.close()
            await self._end_all()
            await self._prober.close()
            self._scratch.remove()

    async def _unless_hurried(self, work: Awaitable[None]) -> None:
        working = asyncio.ensure_future(work)
        while not self._hurry and not working.done():
            await asyncio.wait([working], timeout=HURRY_LOOK_S)
        await _cancel([working])

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            self._hurry = True
        else:
            self._reporter.stopping(f"{number.name} received")
        self._stop.set()

    def _together(self) -> list[list[ProcessRecord]]:
        """The records, those that live and die together in one list."""
        lists: dict[str, list[ProcessRecord]] = {}
        for record in self._records:
            lists.setdefault(record.together or record.name, []).append(record)
        return list(lists.values())

    async def _keep_running(self, records: Sequence[ProcessRecord]) -> None:
        """The life of processes, that all end when one does, over all their restarts."""
        restarts, delay_s = 0, BACKOFF_FIRST_S
        give_up_at = time.monotonic()
        if self._numbers.may_end_for_others(records[0]):
            give_up_at += self._start_timeout_s
        while True:
            start = await self._numbers.next_start(records[0], restarts)
            children = [
                await self._spawn(respawn(record, start.turn), start.incarnation)
                for record in records
            ]
            ended, reason = await self._first_to_end(children, start)
            await end_sessions([each.session for each in children], grace_s=0)
            for each in children:
                each.remove_shared_memory()
            was_ready = all(self._ready[record.name].is_set() for record in records)
            if ended is not None and not was_ready and time.monotonic() >= give_up_at:
                raise StartFailed(ended.record.name, reason, ended.log)
            if children[0].uptime_s >= BACKOFF_RESET_S:
                delay_s = BACKOFF_FIRST_S
            for each in children:
                its_own = reason
                if ended is not None and each is not ended:
                    its_own = f"ends with {ended.record.name}, which {reason}"
                self._reporter.restarting(each.record.name, its_own, delay_s)
            await asyncio.sleep(delay_s)
            restarts, delay_s = restarts + 1, min(2 * delay_s, self._backoff_max_s)

    async def _first_to_end(
        self, children: Sequence[Child], start: Start
    ) -> tuple[Child | None, str]:
        """None: all are to begin anew, though they live."""
        watching: dict[asyncio.Task[str], Child | None] = {
            asyncio.create_task(self._watch(child)): child for child in children
        }
        overtaken = self._numbers.overtaken(children[0].record, start)
        watching[asyncio.create_task(overtaken)] = None
        try:
            done, _ = await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
            first = next(task for task in watching if task in done)
            return watching[first], first.result()
        finally:
            await _cancel(list(watching))

    async def _spawn(self, record: ProcessRecord, incarnation: Incarnation) -> Child:
        # SGLang leaves its sockets in the folder for temporary files.
        env = dict.fromkeys(("TMPDIR", RUN_FOLDER), str(self._scratch.folder))
        if record.secrets:
            env[SECRETS] = str(self._secrets_file(record))
        log = self._logs[record.name]
        if record.is_forked:
            child = await Child.forked(record, log, env, incarnation, self._forks)
        else:
            child = Child(record, log, env, incarnation)
        self._children[record.name] = child
        return child

    def _secrets_file(self, record: ProcessRecord) -> Path:
        """Made anew at each start, so that nobody need keep it in order."""
        path = self._scratch.folder / f"{record.name}.secrets"
        write_private(path, record.secrets)
        return path

    async def _watch(self, child: Child) -> str:
        """Returns, with the reason, when the process has ended or must be ended."""
        record = child.record
        noted_at = time.monotonic()
        while not await self._all_pass(record):
            if time.monotonic() - noted_at > NOTE_PERIOD_S:
                noted_at = time.monotonic()
                self._note_shared_memory(child)
            if await child.exited_within(START_PROBE_PERIOD_S):
                return child.how_it_ended()
            if child.uptime_s > self._start_timeout_s:
                return f"was not ready after {self._start_timeout_s:.0f} s"
        self._note_shared_memory(child)
        self._ready[record.name].set()
        self._reporter.ready(record.name, child.uptime_s)
        silent_probes = 0
        while silent_probes < SILENT_PROBES_MAX:
            probed_at = time.monotonic()
            silent_probes = 0 if await self._prober.passes(record.alive) else silent_probes + 1
            if await child.exited_within(PROBE_PERIOD_S - (time.monotonic() - probed_at)):
                return child.how_it_ended()
        return f"gave no sign of life for {SILENT_PROBES_MAX * PROBE_PERIOD_S:.0f} s"

    def _note_shared_memory(self, child: Child) -> None:
        self._scratch.note_shared_memory(child.note_shared_memory())

    async def _all_pass(self, record: ProcessRecord) -> bool:
        for check in record.ready:
            if not await self._prober.passes(check):
                return False
        return True

    async def _report_progress(self) -> None:
        began = time.monotonic()
        while names := [name for name, event in self._ready.items() if not event.is_set()]:
            self._reporter.waiting(names, time.monotonic() - began)
            await asyncio.sleep(1.0)
        self._reporter.serving()

    async def _end_all(self) -> None:
        ending = asyncio.create_task(self._end_in_turn())
        while not ending.done():
            if self._hurry:
                ending.cancel()
                await end_sessions(self._sessions("gateway", "agent", "engine"), grace_s=0)
                break
            await asyncio.sleep(HURRY_LOOK_S)
        for child in self._children.values():
            await child.exited_within(1.0)
            child.remove_shared_memory()

    async def _end_in_turn(self) -> None:
        """The gateway first, whose open streams need the others; agents last, whose peers the
        engines are. An engine has nothing to save, and SGLang takes more than its grace to end:
        it is killed."""
        await end_sessions(self._sessions("gateway"), STOP_GRACE_S)
        await end_sessions(self._sessions("engine"), grace_s=0)
        await end_sessions(self._sessions("agent"), STOP_GRACE_S)

    def _sessions(self, *kinds: str) -> list[int]:
        children = self._children.values()
        return [child.session for child in children if child.record.kind in kinds]


async def _cancel(tasks: Sequence[asyncio.Task[object]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
