"""Hosts on one machine: each has a network, a home, temporary files, shared memory of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from benchmarks import own_clock
from benchmarks.testbed.network import COMPUTE, Network, Rates, within
from common.user_files import write_private

GATEWAYS = ("gateway", "standby")
"""Hosts in the control namespace, where clients are too."""
LINK_MBIT = 1000.0
SECRET = b"5ec2e7" * 10
GONE_TIMEOUT_S = 5.0
LOOK_S = 0.1
COMMAND_TIMEOUT_S = 20.0
_CLOSING = {"04": "FIN_WAIT1", "05": "FIN_WAIT2", "09": "LAST_ACK", "0B": "CLOSING"}
"""In which a process that has ended leaves a connection to the kernel, until the other end is
closed too: Mooncake closes one that has been idle for 60 s."""
_TIME_WAIT = "06"
_OWN_SHARED_MEMORY = 'mount --bind "$1" /dev/shm && shift && exec "$@"'
_EXTENSIONS = "TORCH_EXTENSIONS_DIR"
"""SGLang compiles its page hash once for all hosts: that takes longer than an engine's start."""


class Left(msgspec.Struct, frozen=True):
    """What is on a host on which nothing runs any more."""

    processes: list[str] = []
    sockets: list[str] = []
    shared_files: list[str] = []
    folders: list[str] = []
    """In its ``TMPDIR``."""
    secrets: list[str] = []
    """Files with the cluster's secret in them, but the one that was given."""
    closing: int = 0
    """Connections that the other end has still to close."""

    @property
    def is_alive(self) -> bool:
        return bool(self.processes or self.sockets)


class Host:
    """One of them; see :class:`Hosts`."""

    def __init__(self, name: str, namespace: str, address: str, folder: Path) -> None:
        self.name = name
        self.address = address
        self.folder = folder
        self._namespace = namespace

    def make(self) -> None:
        for part in ("home", "tmp", "shm"):
            (self.folder / part).mkdir(parents=True)
        _run("mount", "-t", "tmpfs", "tmpfs", str(self.folder / "shm"))
        write_private(self.folder / "cluster.secret", SECRET)

    def remove(self) -> None:
        if (self.folder / "shm").is_mount():
            _run("umount", "--lazy", str(self.folder / "shm"))

    def start(
        self, module: str, flags: Sequence[str], log: Path, clock_s: int = 0
    ) -> subprocess.Popen[bytes]:
        """As a user would, on a host whose clock is off by so much."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("XDG_")}
        environment |= {
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            _EXTENSIONS: os.environ.get(_EXTENSIONS) or f"{Path.home()}/.cache/torch_extensions",
        }
        if clock_s:
            own_clock.write_offset(self.folder / "clock", clock_s)
            environment |= own_clock.environment(self.folder.parent, self.folder / "clock")
        shared = ("sh", "-c", _OWN_SHARED_MEMORY, "sh", str(self.folder / "shm"))
        argv = [*within(self._namespace), *shared, sys.executable, "-m", module]
        argv += ["--cluster-secret-file", str(self.folder / "cluster.secret"), *flags]
        with log.open("ab") as output:
            return subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
            )

    # ---- what is left -------------------------------------------------------------------

    def left(self, timeout_s: float = GONE_TIMEOUT_S) -> Left:
        """Once its processes and sockets are gone, after ``timeout_s`` at the latest."""
        give_up_at = time.monotonic() + timeout_s
        while (left := self._look()).is_alive and time.monotonic() < give_up_at:
            time.sleep(LOOK_S)
        return left

    def _look(self) -> Left:
        pids = _run("ip", "netns", "pids", self._namespace).split()
        titles = {pid: _title(pid) for pid in pids if pid != str(os.getpid())}
        sockets = [] if self.name in GATEWAYS else self._sockets()  # there are clients' too
        is_open = [state not in _CLOSING for _, state in sockets]
        return Left(
            processes=[f"{pid} {title}" for pid, title in titles.items() if title],
            sockets=[ends for (ends, _), is_left in zip(sockets, is_open, strict=True) if is_left],
            closing=is_open.count(False),
            shared_files=sorted(os.listdir(self.folder / "shm")),
            folders=sorted(os.listdir(self.folder / "tmp")),
            secrets=self._secrets(),
        )

    def _sockets(self) -> list[tuple[str, str]]:
        """Their ends, and their states."""
        files = [f"/proc/net/{protocol}" for protocol in ("tcp", "tcp6", "udp", "udp6")]
        lines = _run(*within(self._namespace), "cat", *files).splitlines()
        fields = [line.split() for line in lines if ":" in line.partition(" sl")[0]]
        found = [f for f in fields if len(f) > 3 and f[0].rstrip(":").isdigit()]
        return [(" ".join(f[1:3]), f[3]) for f in found if f[3] != _TIME_WAIT]

    def _secrets(self) -> list[str]:
        files = [p for part in ("home", "tmp", "shm") for p in (self.folder / part).rglob("*")]
        found = []
        for path in files:
            with contextlib.suppress(OSError):  # it has gone
                if path.is_file() and path.stat().st_size < 1 << 20:
                    found += [str(path)] if SECRET in path.read_bytes() else []
        return found


class Hosts:
    """``with Hosts(...).built()``: the calling thread is in the gateways' network then, and must
    have mounts of its own."""

    def __init__(self, names: Sequence[str], scratch: Path) -> None:
        self.network = Network(names, Rates(LINK_MBIT, LINK_MBIT))
        self._scratch = scratch
        self._hosts: dict[str, Host] = {}

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    @contextlib.contextmanager
    def built(self) -> Iterator[Hosts]:
        network, folder = self.network, self._scratch
        network.build()
        try:
            own_clock.build(folder)
            control = network.control, network.control_address(COMPUTE)
            places = dict.fromkeys(GATEWAYS, control)
            for name in network.nodes:
                places[name] = network.namespace(name), network.compute_address(name)
            for name, place in places.items():
                self._hosts[name] = Host(name, *place, folder / name)
                self._hosts[name].make()
            with network.entered():
                yield self
        finally:
            network.remove()  # and what runs there
            for host in self._hosts.values():
                host.remove()


def _title(pid: str) -> str:
    """Empty of one that has ended, such as the one that lists them."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    return ""


def _run(*command: str) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True
    ).stdout
