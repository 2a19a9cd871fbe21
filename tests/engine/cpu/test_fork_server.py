"""Engines that are forked are as those that are started; of a package that stands for SGLang."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.user_files import PRIVATE_UMASK
from engine.cpu.fork_server import COMMAND, MODULES, Forked, ForkServer, Order

TIMEOUT_S = 60
ARGV = (*COMMAND, "--model-path", "a model", "--port", "1")
SERVER = """
import json, os, psutil, sys, time
me = psutil.Process()
print(json.dumps({
    "session": os.getsid(0) == me.pid, "parent": me.ppid(), "umask": os.umask(0o77),
    "argv": sys.argv[1:], "shown": [word for word in me.cmdline() if word],
    "environ": dict(os.environ), "shown environ": me.environ(),
    "open": sorted(os.readlink(f"/proc/self/fd/{n}") for n in (0, 1, 2)),
    "descriptors": len(os.listdir("/proc/self/fd")),
}), flush=True)
if os.environ["DUALPATH_LIFE"] == "short":
    sys.exit("a reason")
time.sleep(600)
"""
THREAD = """
import threading, time
threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
"""
PARENT = """
import asyncio, os, sys
from pathlib import Path
from tests.engine.cpu.test_fork_server import *

async def main():
    print((await fork(ForkServer(), dict(os.environ), Path(sys.argv[1]))).pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def module_file(name: str) -> Path:
    return Path(*name.split(".")).with_suffix(".py")


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """In which the package is found."""
    for name in MODULES:
        path = tmp_path / module_file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        for folder in list(path.relative_to(tmp_path).parents)[:-1]:
            (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "sglang" / "launch_server.py").write_text(SERVER)
    found = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])
    return {**os.environ, "PYTHONPATH": found, "DUALPATH_LIFE": "long", "MINE": "of all"}


async def fork(server: ForkServer, env: dict[str, str], log: Path) -> Forked | None:
    with log.open("ab") as output:
        return await server.fork(Order(ARGV, env), output)


async def said(log: Path) -> Any:
    """What an engine has said of itself."""
    async with asyncio.timeout(TIMEOUT_S):
        while "\n" not in (text := log.read_text()):
            await asyncio.sleep(0.02)
    return json.loads(text.splitlines()[0])


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not holds():
            await asyncio.sleep(0.02)


async def test_an_engine_is_as_if_it_had_been_started(tmp_path: Path, env: dict[str, str]) -> None:
    env |= {"DUALPATH_ENGINE": "p0" * 99, "LONG": "x" * 9999}
    log, other_log = tmp_path / "p0.log", tmp_path / "d0.log"
    with other_log.open("wb") as output:
        started = subprocess.Popen(
            ARGV, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True, umask=PRIVATE_UMASK,
        )  # fmt: skip
    try:
        theirs = await said(other_log)
    finally:
        started.kill()
        started.wait()
    with closing(ForkServer()) as server:
        first = await fork(server, {**env, "DUALPATH_ENGINE": "other"}, tmp_path / "first.log")
        engine = await fork(server, env, log)
        assert first is not None and engine is not None
        try:
            ours = await said(log)
            theirs["open"] = [
                str(log) if each == str(other_log) else each for each in theirs["open"]
            ]
            assert ours == theirs and ours["session"] and ours["environ"]["DUALPATH_ENGINE"]
        finally:
            for forked in (first, engine):
                os.kill(forked.pid, signal.SIGKILL)
        assert (first.wait(), engine.wait()) == (-9, -9)


async def test_an_engine_outlives_the_server_and_its_code_and_words_are_kept(
    tmp_path: Path, env: dict[str, str]
) -> None:
    log = tmp_path / "p0.log"
    with closing(ForkServer()) as server:
        long = await fork(server, env, tmp_path / "long.log")
        short = await fork(server, {**env, "DUALPATH_LIFE": "short"}, log)
    assert long is not None and short is not None
    assert short.wait() == 1 and log.read_text().endswith("a reason\n")
    await said(tmp_path / "long.log")
    assert psutil.pid_exists(long.pid)
    os.kill(long.pid, signal.SIGKILL)
    assert long.wait() == -9


async def test_an_engine_ends_with_who_ordered_it(tmp_path: Path, env: dict[str, str]) -> None:
    log = tmp_path / "p0.log"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(log)], env=env, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    try:
        engine = int(await asyncio.to_thread(parent.stdout.readline))
        assert (await said(log))["parent"] == parent.pid
        below = [process.pid for process in psutil.Process(parent.pid).children()]
        assert len(below) == 2 and engine in below
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    await until(lambda: not any(map(psutil.pid_exists, below)))


async def test_what_cannot_be_forked_is_left_to_be_started(
    tmp_path: Path, env: dict[str, str]
) -> None:
    log = tmp_path / "log"
    with closing(ForkServer()) as server:
        assert (engine := await fork(server, env, log))
        assert await fork(server, {**env, "MINE": "read when imported"}, log) is None
        with log.open("ab") as output:
            assert await server.fork(Order(("nice", *ARGV), env), output) is None
        for child in psutil.Process().children():
            if "fork-server" in child.cmdline()[0]:
                child.kill()
        assert await fork(server, env, log) is None
        assert await fork(server, env, log) is None
    os.kill(engine.pid, signal.SIGKILL)
    assert engine.wait() == -9
    module = tmp_path / module_file(MODULES[-1])
    for content in ("raise ImportError('no such thing')", THREAD):
        module.write_text(content)
        with closing(ForkServer()) as server:
            assert await fork(server, env, log) is None
    assert "no such thing" in log.read_text() and "threads have started" in log.read_text()


THREAD = (
    "import threading, time; threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
)
