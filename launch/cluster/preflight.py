"""What can be known to be wrong before any process is started."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from common.sizes import format_size
from common.user_files import PRIVATE_FOLDER, private
from launch.cluster.ports import ON_EVERY_ADDRESS
from launch.cluster.process_record import ProcessRecord
from launch.flags.node import NodeSettings
from launch.settings import BadConfig
from storage.remote.settings import RemoteSettings
from storage.ssd.folder import OtherFormat, read_state
from transfer.mooncake import PACKAGE_OF, missing_libraries

_SOCKET_PATH_BYTES_MAX = 107
"""Of a unix socket (``sun_path``)."""


def check(config: NodeSettings, records: Sequence[ProcessRecord]) -> list[IO[str]]:
    """Raises :class:`BadConfig`; the returned files hold locks for as long as they are open.

    ``records`` are this host's: of no other are ports, memory and disks seen from here.
    """
    agents = [record.name for record in records if record.kind == "agent"]
    check_memory(config, len(agents), available_memory_bytes())
    check_libraries(missing_libraries())
    _check_socket_paths(records)
    for record in records:
        for purpose, port in record.ports.items():
            check_port(record, purpose, port)
        for purpose, ports in record.choices.items():
            check_choice(record, purpose, ports)
    _check_writable(config.log_folder, "--log-dir")
    check_remote(config)
    stores = config.ssd_folders if config.ssd_bytes else []
    for folder in stores:
        _check_writable(folder, "--ssd-dir")
    check_formats(config, agents)
    return [_lock_store(folder, agent) for folder in stores for agent in agents]


def _check_socket_paths(records: Sequence[ProcessRecord]) -> None:
    """Unix sockets in the run folder can have their names."""
    folder = Path(tempfile.gettempdir(), "dualpath-xxxxxxxx")
    longest = max((f"{folder}/{record.name}.00" for record in records), key=len, default="")
    if len(longest.encode()) > _SOCKET_PATH_BYTES_MAX:
        raise BadConfig(
            f"the folder for temporary files, {folder.parent}, has too long a name for sockets in "
            "it: set TMPDIR to a shorter one."
        )


def check_port(record: ProcessRecord, purpose: str, port: int) -> None:
    """The port can be bound now."""
    option = "--port" if record.kind == "gateway" else "--base-port"
    host = "" if purpose in ON_EVERY_ADDRESS else record.host
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise BadConfig(
                    f"port {port} of {record.host} is in use, and {record.name} needs it "
                    f"({purpose}): end the process that has it, or choose another {option}."
                ) from error
            raise BadConfig(
                f"{record.name} cannot listen on {record.host}:{port}: {error.strerror}; "
                f"choose another --host or {option}."
            ) from error


def check_choice(record: ProcessRecord, purpose: str, ports: range) -> None:
    """At least half of them can be bound: a process that restarts finds what it needs."""
    taken = []
    for port in ports:
        try:
            check_port(record, purpose, port)
        except BadConfig:
            taken.append(port)
    if 2 * len(taken) > len(ports):
        raise BadConfig(
            f"{record.name} needs some of the ports {ports.start} to {ports.stop - 1} of "
            f"{record.host} ({purpose}), but {len(taken)} of them are in use: choose another "
            "--base-port."
        )


def check_memory(config: NodeSettings, agents: int, available_bytes: int) -> None:
    """The DRAM tiers, which so many agents fill with zeros at start, fit."""
    if agents * config.dram_bytes > available_bytes:
        raise BadConfig(
            f"--dram-bytes {format_size(config.dram_bytes)} for each of {agents} agents, but "
            f"{format_size(available_bytes)} of memory are available: choose less."
        )


def check_libraries(missing: Sequence[str]) -> None:
    """Mooncake's engine finds the libraries that it links."""
    if missing:
        wanted = ", ".join(
            f"{name} ({PACKAGE_OF.get(name, 'unknown package')})" for name in missing
        )
        raise BadConfig(
            f"Mooncake cannot be loaded, these libraries are missing: {wanted}. Install them, or "
            "run `make setup` as root."
        )


def check_remote(config: NodeSettings) -> None:
    """The remote tier's URL and options make a filesystem."""
    if not config.remote:
        return
    from storage.remote.objects.object_store import RemoteUnusable
    from storage.remote.objects.open_store import open_store

    try:
        open_store(config.remote, config.remote_options, RemoteSettings().timeout_s)
    except RemoteUnusable as error:
        raise BadConfig(f"--remote (--remote-options): {error}.") from error


def check_formats(config: NodeSettings, agents: Sequence[str]) -> None:
    """This version wrote the SSD folders of these agents."""
    refusals = []
    for agent in agents:
        for folder in config.ssd_folders_of(agent):
            try:
                read_state(folder)
            except OtherFormat as error:
                refusals.append(error)
            except OSError as error:
                raise BadConfig(f"--ssd-dir: {folder}: {error.strerror}.") from error
    if refusals:
        others = ", ".join(str(refusal.directory) for refusal in refusals[1:])
        more = f" The same holds for {others}." if others else ""
        raise BadConfig(f"--ssd-dir: {refusals[0]}.{more}") from refusals[0]


def _check_writable(folder: Path, option: str) -> None:
    try:
        folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadConfig(
            f"{option} {folder} is not writable ({error.strerror}): choose another folder."
        ) from error


def _lock_store(folder: Path, agent: str) -> IO[str]:
    """Two agents with the same folder would overwrite each other's blocks. Agents of one host
    share a disk, whichever command started them, but no name."""
    lock = open(folder / f".{agent}.lock", "w", opener=private)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise BadConfig(
            f"--ssd-dir {folder} is in use by another cluster, whose {agent} keeps its blocks "
            "there: give each its own folder."
        ) from error
    return lock


def available_memory_bytes() -> int:
    """What processes may still take, as the kernel sees it."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    return (
        int(match[1]) * 1024 if match else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
