"""Engines on a CPU are forked from one process, which has imported SGLang for all of them:
``python -m engine.cpu.fork_server``, started by the supervisor.

What an engine imports takes most of its start, and is the same each time. That process does nothing
else: it has one thread, no device and no settings. An engine becomes a child of the supervisor, as
if that had started it, with the environment, the command line and the output that it would have.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import IO

import msgspec

from common.user_files import PRIVATE_UMASK
from engine import serve

COMMAND = (sys.executable, "-m", serve.__name__)
"""With which an engine is started by itself."""
MODULES = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.disaggregation.mooncake.conn",
    "sglang.srt.models.registry",
)
"""They import nearly all that an engine does, but for Mooncake, which starts threads."""
READ_LATER = ("DUALPATH_", "MC_", "SGLANG_HOST_IP", "OTEL_RESOURCE_ATTRIBUTES")
"""Beginnings of names of variables that are read after the fork: engines may differ in them."""
FORK_WAIT_S = 120.0
"""For the imports, and for a fork; an engine is then started by itself."""
_ORDER_BYTES_MAX = 1 << 18  # more than the kernel lets through by itself
_ARGUMENTS_ROOM, _ENVIRONMENT_ROOM = " " * (1 << 13), " " * (1 << 15)
_READY = b"ready"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None)


class Order(msgspec.Struct, frozen=True):
    """An engine to be forked; the file for its output comes beside it."""

    argv: Sequence[str]
    """:data:`COMMAND` and flags."""
    env: Mapping[str, str]


class Forked:
    """A child of this process that another one has forked; as ``subprocess.Popen``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def wait(self) -> int:
        """Until it has ended: its code, negative for a signal."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


class ForkServer:
    """The supervisor's side. The process is started by the first order, in whose environment it
    imports, and to whose output it writes."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._environment: dict[str, str] = {}
        self._turn = asyncio.Lock()

    async def fork(self, order: Order, output: IO[bytes]) -> Forked | None:
        """An engine, the leader of a session; None if it has to be started by itself."""
        if tuple(order.argv[: len(COMMAND)]) != COMMAND:  # such as one in another namespace
            return None
        async with self._turn:
            try:
                async with asyncio.timeout(FORK_WAIT_S):
                    if self._process is None:
                        await self._start(_read_early(order.env), output)
                    if _read_early(order.env) != self._environment:
                        return None
                    return await self._fork(order, output)
            except (OSError, ValueError, TimeoutError):  # it has ended, or never will
                self.close()
                return None

    def close(self) -> None:
        """Ends the process, and none of the engines."""
        if self._process is not None:
            self._orders.close()
            self._process.kill()
            self._process.wait()

    async def _start(self, environment: dict[str, str], output: IO[bytes]) -> None:
        self._environment = environment
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._orders.setblocking(False)
        # Room for what engines show as theirs; no title is to be written over the environment.
        room = {"SPT_NOENV": "1", "ROOM": _ENVIRONMENT_ROOM}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(os.getpid()), _ARGUMENTS_ROOM],
                env=environment | room,
                stdin=theirs.fileno(),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        if await asyncio.get_running_loop().sock_recv(self._orders, len(_READY)) != _READY:
            raise OSError("it has ended")

    async def _fork(self, order: Order, output: IO[bytes]) -> Forked:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)  # it leaves us the engine, as an orphan
        try:
            socket.send_fds(self._orders, [msgspec.json.encode(order)], [output.fileno()])
            return Forked(int(await asyncio.get_running_loop().sock_recv(self._orders, 32)))
        finally:
            _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _read_early(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if not name.startswith(READ_LATER)}


def main() -> None:
    """Serves the process that has started it, and ends with it."""
    supervisor = int(sys.argv[1])
    _end_with(supervisor)
    orders = socket.socket(fileno=os.dup(0))
    gc.disable()
    for module in MODULES:
        import_module(module)
    import_module("setproctitle").getproctitle()  # it notes where the arguments are
    _write(_shown()[0], ["dualpath::fork-server"])
    gc.freeze()
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("threads have started, which no fork survives: engines start by themselves")
    orders.send(_READY)
    _next_engine(orders, supervisor)
    serve.main()


def _next_engine(orders: socket.socket, supervisor: int) -> None:
    """Returns in each engine. In this process, never."""
    while True:
        message, files, _, _ = socket.recv_fds(orders, _ORDER_BYTES_MAX, 1)
        if not message:
            sys.exit()
        started, go = os.pipe(), os.pipe()
        between = os.fork()
        if between == 0:
            if os.fork():
                os._exit(0)
            os.setsid()
            os.write(started[1], str(os.getpid()).encode())
            if os.read(go[0], 1) != b"g":  # the one that it was forked from has been ended
                os._exit(1)
            for descriptor in (*started, *go):
                os.close(descriptor)
            orders.close()
            _end_with(supervisor)
            _become(msgspec.json.decode(message, type=Order), files[0])
            return
        os.waitpid(between, 0)  # from now on it is the supervisor's
        orders.send(os.read(started[0], 32))
        os.write(go[1], b"g")
        for descriptor in (*started, *go, *files):
            os.close(descriptor)


def _end_with(parent: int) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


def _become(order: Order, output: int) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, standard in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, standard)
    os.close(nothing)
    os.close(output)
    os.umask(PRIVATE_UMASK)
    os.environ.clear()  # the C library's strings, too, are elsewhere then
    os.environ.update(order.env)
    arguments, environment = _shown()
    _write(arguments, order.argv)
    _write(environment, (f"{name}={value}" for name, value in order.env.items()))
    sys.argv[1:] = order.argv[len(COMMAND) :]
    sys.orig_argv[:] = order.argv
    import_module("numpy").random.seed()  # Python's own does that by itself


def _shown() -> list[slice]:
    """Where the memory is that ``/proc`` shows as arguments and as environment, by which people
    and programs know a process."""
    stat = Path("/proc/self/stat").read_text()
    fields = [int(field) for field in stat[stat.rindex(")") + 4 :].split()]
    return [slice(*fields[44:46]), slice(*fields[46:48])]


def _write(memory: slice, strings: Iterable[str]) -> None:
    length = memory.stop - memory.start
    text = b"".join(os.fsencode(string) + b"\0" for string in strings)[: length - 1]
    ctypes.memmove(memory.start, text.ljust(length, b"\0"), length)


if __name__ == "__main__":
    main()
