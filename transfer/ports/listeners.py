"""Every listening socket of the clusters of this machine, as the kernel shows them in ``/proc``."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from common.process_settings import RUN_FOLDER
from transfer.connections import Address, address_of, sockets_of
from transfer.ports.source_filter import admitted, filter_of, parse

_SETTINGS = ("DUALPATH_AGENT", "DUALPATH_ENGINE", "DUALPATH_GATEWAY")
"""Variables that hold them, each of one kind of process."""
_LISTENING = "0A"
_ACCEPTS = 0x10000
"""Flag of a listening unix socket (``__SO_ACCEPTCON``)."""
_PIDFD_GETFD = 438


class Listener(msgspec.Struct, frozen=True, order=True):
    """``where`` is ADDRESS:PORT, or the path of a unix socket."""

    owner: str
    """Of the cluster's processes."""
    pid: int
    where: str
    protection: str
    is_open: bool
    """To others than the hosts that the configuration names, and the gateway as members'."""


class _Process(msgspec.Struct, frozen=True):
    pid: int
    kind: str
    name: str
    settings: dict[str, object]
    run_folder: str


def listeners() -> list[Listener]:
    """Of all processes of clusters that this user may look at."""
    found: dict[tuple[str, int], Listener] = {}
    for process in _processes():
        with contextlib.suppress(OSError):  # it ended meanwhile
            inodes = sockets_of(process.pid)
            for listener, inode in [*_tcp(process, inodes), *_unix(process, inodes)]:
                found.setdefault((listener.where, inode), listener)  # children have their parent's
    return sorted(found.values())


def _processes() -> Iterator[_Process]:
    """Known by their session, which is one process's of the cluster with its children: SGLang's
    schedulers write their titles over their environment."""
    pids = sorted(map(int, filter(str.isdigit, os.listdir("/proc"))))
    of_session: dict[int, _Process] = {}
    for process in _with_settings(pids):
        with contextlib.suppress(ProcessLookupError):
            of_session.setdefault(os.getsid(process.pid), process)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, KeyError):
            yield msgspec.structs.replace(of_session[os.getsid(pid)], pid=pid)


def _with_settings(pids: list[int]) -> Iterator[_Process]:
    for entry in pids:
        try:
            text = Path(f"/proc/{entry}/environ").read_bytes().decode(errors="replace")
        except OSError:  # another user's, or it ended meanwhile
            continue
        environ = dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)
        kinds = [name for name in _SETTINGS if name in environ]
        if kinds and RUN_FOLDER in environ:
            settings = json.loads(environ[kinds[0]])
            kind = kinds[0].removeprefix("DUALPATH_").lower()
            name = settings.get("name", kind)
            yield _Process(entry, kind, name, settings, environ[RUN_FOLDER])


def _rows(pid: int, table: str) -> list[list[str]]:
    """Of a table of the network that the process is in."""
    try:
        return [line.split() for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()]
    except OSError:
        return []


def _tcp(process: _Process, inodes: dict[int, int]) -> Iterator[tuple[Listener, int]]:
    for table in ("tcp", "tcp6"):
        for row in _rows(process.pid, table)[1:]:
            inode = int(row[9])
            if row[3] != _LISTENING or inode not in inodes:
                continue
            address, port = address_of(row[1])
            is_open, protection = _protection(process, address, port, inodes[inode])
            where = f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
            yield Listener(process.name, process.pid, where, protection, is_open), inode


def _protection(
    process: _Process, address: Address, port: int, descriptor: int
) -> tuple[bool, str]:
    """Whether others are heard than the cluster's hosts, and who is."""
    if address.is_loopback:
        return False, "this host alone"
    if process.kind == "gateway":
        return False, "everyone who reaches this address, as --host says"
    if port in _control_ports(process):
        return False, "who has a key of the cluster's secret"
    heard = process.settings.get("heard")
    if not isinstance(heard, list) or not heard:
        return True, "OPEN to everyone who reaches this host (--peers-from any)"
    try:
        code = _filter_at(process.pid, descriptor)
    except OSError as error:
        return True, f"not to be seen from here ({error.strerror}): run this as root"
    try:
        networks = admitted(code)
    except ValueError:
        return True, "OPEN to everyone who reaches this address"
    named = parse(str(network) for network in heard)
    members = [network for network in networks if network not in named]
    hears_more = any(network.prefixlen < network.max_prefixlen for network in members)
    return hears_more, f"packets from {', '.join(map(str, networks))} alone"


def _control_ports(process: _Process) -> set[int]:
    controls = process.settings.get("controls", [process.settings.get("control")])
    endpoints = controls if isinstance(controls, list) else []
    tcp = [str(endpoint) for endpoint in endpoints if str(endpoint).startswith("tcp:")]
    return {int(endpoint.rpartition(":")[2]) for endpoint in tcp}


def _filter_at(pid: int, descriptor: int) -> bytes:
    """The filter of another process's socket."""
    pidfd = os.pidfd_open(pid)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        copied = libc.syscall(_PIDFD_GETFD, pidfd, descriptor, 0)
        if copied < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        with socket.socket(fileno=copied) as tcp:
            return filter_of(tcp)
    finally:
        os.close(pidfd)


def _unix(process: _Process, inodes: dict[int, int]) -> Iterator[tuple[Listener, int]]:
    for row in _rows(process.pid, "unix")[1:]:
        if len(row) < 8 or int(row[6]) not in inodes or not int(row[3], 16) & _ACCEPTS:
            continue
        is_open, protection = _unix_protection(row[7])
        yield Listener(process.name, process.pid, row[7], protection, is_open), int(row[6])


def _unix_protection(path: str) -> tuple[bool, str]:
    try:
        mode = stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode)
    except OSError:  # without a path, or removed
        return False, "processes that have a descriptor of it"
    if mode & 0o077:
        return True, f"every user of this host (folder {mode:04o})"
    return False, f"this user alone (folder {mode:04o})"
