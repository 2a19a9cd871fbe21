"""TCP connections of this host, as its kernel knows them, and how one of our own is cut.

Evidence that bytes can no longer come in: a process's memory is written only from a socket that
the kernel still has. Over TCP, Mooncake keeps a few connections from each process to each other
one, reads what comes in straight into registered memory, and puts no bound on when: a sender
that has given a write up, or is dead, leaves its kernel to send the rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import os
import socket
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

HANDSHAKE_TIMEOUT_S = 5.0
_METADATA = b"\x01"
"""Mooncake's ``HandShakeRequestType::Metadata``: "tell me what you are"."""
_ESTABLISHED, _SYN_RECEIVED, _CLOSE_WAIT, _LISTEN = 0x1, 0x3, 0x8, 0xA
_TABLES = (Path("/proc/thread-self/net/tcp"), Path("/proc/thread-self/net/tcp6"))
_libc = ctypes.CDLL(None, use_errno=True)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Endpoint(NamedTuple):
    """An address, of IPv4 also where a socket of IPv6 has it."""

    host: str
    port: int


class Connection(NamedTuple):
    """As one of its ends sees it."""

    here: Endpoint
    there: Endpoint


def data_port(session_id: str) -> int:
    """Where a Mooncake peer takes connections for data; 0 if it takes none, over RDMA.

    Raises :class:`OSError` or :class:`ValueError` if it does not answer so.
    """
    host, _, port = session_id.rpartition(":")
    request = _METADATA + b"{}"
    with socket.create_connection((host.strip("[]"), int(port)), HANDSHAKE_TIMEOUT_S) as link:
        link.sendall(struct.pack("<Q", len(request)) + request)
        with link.makefile("rb") as answer:
            (length,) = struct.unpack("<Q", answer.read(8))
            described = json.loads(answer.read(length)[len(_METADATA) :])
    return int(described.get("tcp_data_port", 0))


def connections(ports: Collection[int]) -> Iterator[tuple[Connection, int]]:
    """All connections with one of these ports at either end over which a process may still get
    bytes, and the socket's inode; 0 while no process has it."""
    wanted = {f"{port:04X}" for port in ports}
    for table in _TABLES:
        with contextlib.suppress(FileNotFoundError):  # a host without IPv6
            for line in table.read_text().splitlines()[1:]:
                fields = line.split(maxsplit=10)
                here, there = fields[1], fields[2]
                if here[-4:] not in wanted and there[-4:] not in wanted:
                    continue  # most of a busy host's
                state, inode = int(fields[3], 16), int(fields[9])
                # Closed by its process, or not taken by it yet: told apart by their states.
                is_open = inode or state in (_ESTABLISHED, _SYN_RECEIVED, _CLOSE_WAIT)
                if is_open and state != _LISTEN:
                    yield Connection(_endpoint(here), _endpoint(there)), inode


def sockets_of(process: int | Literal["self"]) -> dict[int, int]:
    """Inode -> a descriptor. Raises :class:`OSError` if there is no such process, or it is
    another user's."""
    sockets = {}
    for entry in os.listdir(f"/proc/{process}/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            kind, _, inode = os.readlink(f"/proc/{process}/fd/{entry}").partition(":[")
            if kind == "socket":
                sockets[int(inode.rstrip("]"))] = int(entry)
    return sockets


def own_sockets() -> dict[int, int]:
    """Inode -> a descriptor of this process."""
    return sockets_of("self")


def cut(inodes: Collection[int]) -> None:
    """End those connections that are this process's own, now: what the kernel still had to send
    or to hand over is dropped, the other end is reset, whoever reads gets an error."""
    own = own_sockets() if inodes else {}
    for inode in inodes:
        if inode in own:
            with contextlib.suppress(OSError):  # closed meanwhile
                _disconnect(own[inode], inode)


def _disconnect(descriptor: int, inode: int) -> None:
    ours = os.dup(descriptor)
    try:
        if os.fstat(ours).st_ino == inode:  # else closed, and another file is open there
            nowhere = struct.pack("=H14x", socket.AF_UNSPEC)
            _libc.connect(ours, nowhere, len(nowhere))
    finally:
        os.close(ours)


def address_of(text: str) -> tuple[Address, int]:
    """``0100007F:1F90`` of ``/proc/net/tcp``: words of the address in the host's order, the port in
    the network's."""
    address, _, port = text.partition(":")
    words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
    return ipaddress.ip_address(struct.pack(f"={len(words)}I", *words)), int(port, 16)


def _endpoint(text: str) -> Endpoint:
    host, port = address_of(text)
    mapped = getattr(host, "ipv4_mapped", None)
    return Endpoint(str(mapped or host), port)
