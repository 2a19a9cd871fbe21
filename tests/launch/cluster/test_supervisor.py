"""The supervisor on small stand-ins: real processes, real ports, no engines."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from common.ids import Incarnation
from launch.cluster import supervisor as supervisor_module
from launch.cluster.child import session_members
from launch.cluster.process_record import HealthCheck, ProcessRecord
from launch.cluster.supervisor import Numbers, Start, StartFailed, Supervisor
from tests.common.ports import free_port

STAND_IN = """
import http.server, os, signal, subprocess, sys, threading, time
port, mode = int(sys.argv[1]), sys.argv[2]
if mode == "crash":
    time.sleep(0.5)  # by then others have begun
    sys.exit("cannot go on: out of luck")
if mode == "secretive":
    with open(sys.argv[3], "w") as file:
        file.write(os.environ["DUALPATH_SECRETS"])
if mode == "stubborn":  # ignores SIGTERM, with a child of another process group
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from multiprocessing.shared_memory import SharedMemory
    memory = SharedMemory(create=True, size=4096)
    with open(sys.argv[3], "w") as file:
        file.write(memory.name)
    subprocess.Popen(["sleep", "600"], preexec_fn=lambda: os.setpgid(0, 0))
if mode == "leaver":  # as SGLang's schedulers, whose files nobody removes when they are killed
    import mmap
    path = f"/dev/shm/sglang_loads_test_{os.getpid()}"
    file = open(path, "w+b")
    file.truncate(4096)
    mapped = mmap.mmap(file.fileno(), 4096)
    with open(sys.argv[3], "w") as note:
        note.write(path)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"{os.getpid()} {os.environ['DUALPATH_INCARNATION']}".encode())
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer.allow_reuse_address = True
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class Recorder:
    """Reporter that keeps what it was told."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.restarts: list[tuple[str, str, float]] = []
        self.is_serving = asyncio.Event()

    def ready(self, name, seconds):
        self.order.append(name)

    def waiting(self, names, seconds): ...

    def serving(self):
        self.is_serving.set()

    def restarting(self, name, reason, delay_s):
        self.restarts.append((name, reason, delay_s))

    def stopping(self, reason): ...


def stand_in(
    name: str, mode: str = "normal", note: Path | None = None, kind: str = "agent"
) -> ProcessRecord:
    """``note``: where a stubborn one writes the name of the shared memory that it made."""
    port = free_port()
    check = HealthCheck("http", f"http://127.0.0.1:{port}/")
    return ProcessRecord(
        name=name,
        kind=kind,
        argv=(sys.executable, "-S", "-c", STAND_IN, str(port), mode, str(note)),
        env={},
        host="127.0.0.1",
        ports={"http": port},
        ready=(check,),
        alive=check,
    )


def ask(record: ProcessRecord) -> tuple[int, int]:
    """(pid, incarnation) of whoever serves the record now."""
    with urllib.request.urlopen(record.alive.target, timeout=2) as answer:
        pid, incarnation = answer.read().split()
    return int(pid), int(incarnation)


async def ask_until(record: ProcessRecord, other_than_pid: int) -> tuple[int, int]:
    for _ in range(200):
        await asyncio.sleep(0.05)
        try:
            answer = await asyncio.to_thread(ask, record)
        except OSError:
            continue
        if answer[0] != other_than_pid:
            return answer
    raise AssertionError(f"{record.name} did not come back")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(supervisor_module, "PROBE_PERIOD_S", 0.2)
    monkeypatch.setattr(supervisor_module, "START_PROBE_PERIOD_S", 0.05)
    monkeypatch.setattr(supervisor_module, "BACKOFF_FIRST_S", 0.1)
    monkeypatch.setattr(supervisor_module, "SILENT_PROBES_MAX", 2)
    monkeypatch.setattr(supervisor_module, "STOP_GRACE_S", 1.0)
    monkeypatch.setattr("launch.cluster.health._TIMEOUT_S", 0.5)


class Cluster:
    """A supervisor running as a task, ended by a signal to this process."""

    def __init__(
        self, records: list[ProcessRecord], logs: Path, numbers: Numbers | None = None
    ) -> None:
        self.told = Recorder()
        self.supervisor = Supervisor(records, logs, self.told, start_timeout_s=20, numbers=numbers)
        self.task = asyncio.create_task(self.supervisor.run())

    async def __aenter__(self) -> Recorder:
        await asyncio.wait_for(self.told.is_serving.wait(), 20)
        return self.told

    async def __aexit__(self, *error) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(self.task, 10)


async def test_a_signal_begins_the_drain_and_a_second_one_cuts_it_short(quick, tmp_path):
    record = stand_in("engine", kind="engine")
    draining, pid = asyncio.Event(), 0

    async def drain() -> None:
        nonlocal pid
        pid, _ = await asyncio.to_thread(ask, record)  # it still serves
        draining.set()
        await asyncio.Event().wait()

    cluster = Cluster([record], tmp_path)
    cluster.supervisor.drain = drain
    async with cluster:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(draining.wait(), 20)
        assert session_members([pid]) and not cluster.task.done()
    assert session_members([pid]) == []


async def test_starts_are_numbered_as_given(quick, tmp_path):
    class Given(Numbers):
        last = 41

        async def next_start(self, record: ProcessRecord, restarts: int) -> Start:
            self.last += 1
            return Start(Incarnation(self.last), restarts)

    record = stand_in("agent")
    async with Cluster([record], tmp_path, Given()):
        pid, incarnation = await asyncio.to_thread(ask, record)
        assert incarnation == 42
        os.kill(pid, signal.SIGKILL)
        assert (await ask_until(record, other_than_pid=pid))[1] == 43


async def test_processes_start_side_by_side_and_a_signal_ends_all_of_them(quick, tmp_path):
    note = tmp_path / "note"
    first, second = stand_in("first"), stand_in("second", "stubborn", note)
    async with Cluster([first, second], tmp_path) as told:
        assert set(told.order) == {"first", "second"}
        sessions = [(await asyncio.to_thread(ask, record))[0] for record in (first, second)]
        assert len(session_members(sessions)) == 4  # one is Python's resource tracker
        shared = Path("/dev/shm") / note.read_text()
        assert shared.exists()
        ending = time.monotonic()
    assert time.monotonic() - ending < 5
    assert session_members(sessions) == []
    assert not shared.exists()
    for record in (first, second):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", record.ports["http"]))


async def test_engines_serve_until_the_gateway_has_ended(quick, tmp_path):
    gateway = stand_in("gateway", "stubborn", tmp_path / "note", kind="gateway")
    engine = stand_in("p0", kind="engine")
    async with Cluster([gateway, engine], tmp_path):
        pid, _ = await asyncio.to_thread(ask, engine)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.5)  # the gateway, which ignores it, has 1 s
        assert (await asyncio.to_thread(ask, engine))[0] == pid
    assert session_members([pid]) == []


async def test_a_start_that_fails_half_way_leaves_nothing_and_names_the_culprit(quick, tmp_path):
    good, bad = stand_in("good"), stand_in("bad", "crash")
    supervisor = Supervisor([good, bad], tmp_path, Recorder(), start_timeout_s=20)
    with pytest.raises(StartFailed, match="bad exited with code 1") as caught:
        await supervisor.run()
    assert "out of luck" in caught.value.log.read_text()
    with pytest.raises(OSError):
        ask(good)


async def test_a_process_that_is_never_ready_fails_the_start(quick, tmp_path):
    record = stand_in("mute")
    deaf = HealthCheck("http", f"http://127.0.0.1:{free_port()}/")
    mute = ProcessRecord(**{**vars(record), "ready": (deaf,)})
    with pytest.raises(StartFailed, match="not ready after 1 s"):
        await Supervisor([mute], tmp_path, Recorder(), start_timeout_s=1).run()


async def test_a_dead_process_returns_with_a_later_incarnation_and_longer_delays(quick, tmp_path):
    record = stand_in("fragile", "stubborn", note=tmp_path / "note")
    async with Cluster([record], tmp_path) as told:
        pid, incarnation = await asyncio.to_thread(ask, record)
        for _ in range(2):
            os.kill(pid, signal.SIGKILL)
            old_pid, old_incarnation = pid, incarnation
            pid, incarnation = await ask_until(record, old_pid)
            assert incarnation > old_incarnation
            assert session_members([old_pid]) == []  # the dead leader's child is gone too
        assert [restart[0] for restart in told.restarts] == ["fragile", "fragile"]
        assert "SIGKILL" in told.restarts[0][1]
        assert told.restarts[1][2] == 2 * told.restarts[0][2]


async def test_shared_memory_of_a_process_that_somebody_killed_does_not_stay(quick, tmp_path):
    note = tmp_path / "note"
    record = stand_in("p0", "leaver", note, kind="engine")
    async with Cluster([record], tmp_path):
        pid, _ = await asyncio.to_thread(ask, record)
        first = Path(note.read_text())
        assert first.exists()
        os.kill(pid, signal.SIGKILL)
        await ask_until(record, other_than_pid=pid)
        second = Path(note.read_text())
        assert not first.exists() and second.exists()
    assert not second.exists()


async def test_a_process_that_hangs_is_ended_and_started_again(quick, tmp_path):
    record = stand_in("sleepy")
    async with Cluster([record], tmp_path) as told:
        pid, _ = await asyncio.to_thread(ask, record)
        os.kill(pid, signal.SIGSTOP)
        await ask_until(record, pid)
        assert session_members([pid]) == []
        assert "no sign of life" in told.restarts[0][1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_ranks_of_one_engine_end_together_and_start_together(quick, tmp_path, number):
    ranks = [replace(stand_in(name, kind="engine"), together="p0") for name in ("p0", "p0-1")]
    async with Cluster([*ranks, stand_in("d0", kind="engine")], tmp_path) as told:
        before = [await ask_until(record, other_than_pid=0) for record in ranks]
        os.kill(before[1][0], number)
        after = [
            await ask_until(record, pid) for record, (pid, _) in zip(ranks, before, strict=True)
        ]
        assert session_members([pid for pid, _ in before]) == []
        assert before[0][1] == before[1][1] < after[0][1] == after[1][1]
        assert [name for name, _, _ in told.restarts] == ["p0", "p0-1"]
        assert any("ends with p0-1" in reason for _, reason, _ in told.restarts)


async def test_ranks_begin_anew_when_those_of_other_hosts_do(quick, tmp_path):
    class Told(Numbers):
        anew = asyncio.Event()

        async def overtaken(self, record, start):
            await self.anew.wait()
            self.anew.clear()
            return "begins anew"

    numbers = Told()
    record = replace(stand_in("p0-1", kind="engine"), together="p0")
    async with Cluster([record], tmp_path, numbers) as told:
        pid, incarnation = await ask_until(record, other_than_pid=0)
        numbers.anew.set()
        assert (await ask_until(record, other_than_pid=pid))[1] > incarnation
        assert session_members([pid]) == []
        assert told.restarts[0][:2] == ("p0-1", "begins anew")


async def test_a_start_that_others_may_have_spoilt_is_tried_again(quick, tmp_path):
    class Shared(Numbers):
        again = asyncio.Event()

        def may_end_for_others(self, record):
            return True

        async def next_start(self, record, restarts):
            if restarts:
                self.again.set()
            return await super().next_start(record, restarts)

    told, numbers = Recorder(), Shared()
    bad = stand_in("p0-1", "crash", kind="engine")
    supervisor = Supervisor([bad], tmp_path, told, start_timeout_s=600, numbers=numbers)
    running = asyncio.create_task(supervisor.run())
    await asyncio.wait_for(numbers.again.wait(), 60)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(running, 60)
    assert told.restarts[0][:2] == ("p0-1", "exited with code 1")


async def test_what_a_process_writes_and_its_secrets_are_its_users_alone(quick, tmp_path):
    note = tmp_path / "note"
    record = replace(stand_in("agent-p0", "secretive", note), secrets=b'{"a": "hush"}')
    mask = os.umask(0o022)
    try:
        async with Cluster([record], tmp_path):
            secrets = Path(note.read_text())
            assert secrets.read_bytes() == record.secrets
            files = [secrets, note, tmp_path / "agent-p0.log", secrets.parent]
            assert [f.stat().st_mode & 0o777 for f in files] == [0o600] * 3 + [0o700]
        assert not secrets.exists()
    finally:
        os.umask(mask)


LAUNCHER = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.launch.cluster.test_supervisor import Recorder, Supervisor, stand_in, ask
records = [stand_in("one"), stand_in("two")]
async def main():
    told = Recorder()
    run = asyncio.create_task(Supervisor(records, Path(sys.argv[2]), told, 20).run())
    await told.is_serving.wait()
    print(*(ask(record)[0] for record in records), flush=True)
    await run
asyncio.run(main())
"""


def test_nothing_outlives_a_launcher_that_was_killed(tmp_path):
    command = [sys.executable, "-c", LAUNCHER, str(Path(__file__).parent), str(tmp_path)]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert launcher.stdout is not None
    sessions = [int(pid) for pid in launcher.stdout.readline().split()]
    assert len(session_members(sessions)) == 2
    launcher.kill()
    launcher.wait(5)
    launcher.stdout.close()
    give_up_at = time.monotonic() + 5
    while session_members(sessions) and time.monotonic() < give_up_at:
        time.sleep(0.05)
    assert session_members(sessions) == []
