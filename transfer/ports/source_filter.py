"""Whom the listening sockets of a process hear: a filter of packets, by the address they come from.

Mooncake and torch listen on every address and ask nobody who they are; neither has an option that
binds to one (``MC_TCP_BIND_ADDRESS`` is what Mooncake calls itself by). A socket filter drops what
comes from elsewhere before TCP sees it. It takes no privilege and no program, holds whatever
interfaces a machine has or gets, is inherited by accepted connections, and ends with its socket,
which rules of a firewall would not.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence

from transfer.connections import own_sockets

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
LOOPBACK = ("127.0.0.0/8", "::1/128")
INSTRUCTIONS_MAX = 4096
"""That the kernel takes (``BPF_MAXINSNS``): about a thousand networks."""

_SO_ATTACH_FILTER = _SO_GET_FILTER = 26
_INSTRUCTION = struct.Struct("=HBBI")
# linux/filter.h and linux/bpf_common.h
_LOAD_HALF, _LOAD_WORD, _AND, _JUMP, _JUMP_IF_EQUAL, _RETURN = 0x28, 0x20, 0x54, 0x05, 0x15, 0x06
_PROTOCOL = 0xFFFFF000
_NETWORK_HEADER = 0xFFF00000
_IPV4, _IPV6 = 0x0800, 0x86DD
_SOURCE = {4: 12, 6: 8}
"""Where the source address begins in the header of a packet."""
_TAKE, _DROP = (_RETURN, 0, 0, 0xFFFFFFFF), (_RETURN, 0, 0, 0)

Instruction = tuple[int, int, int, int]


class CannotFilter(Exception):
    """A port would be open to everyone; the text says what to do."""


def parse(networks: Iterable[str]) -> list[Network]:
    """Networks, or single addresses. Raises ValueError."""
    return [ipaddress.ip_network(network) for network in networks]


def is_address(host: str) -> bool:
    """And not a name, which is an address only once it is resolved."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def program(networks: Sequence[Network]) -> bytes:
    """Of the filter that takes packets from these networks alone."""
    ipv4 = [each for network in networks if network.version == 4 for each in _takes(network)]
    ipv6 = [each for network in networks if network.version == 6 for each in _takes(network)]
    instructions = [
        (_LOAD_HALF, 0, 0, _PROTOCOL),
        (_JUMP_IF_EQUAL, 1, 0, _IPV4),
        (_JUMP, 0, 0, len(ipv4) + 1),
        *ipv4,
        _DROP,
        (_JUMP_IF_EQUAL, 1, 0, _IPV6),
        _DROP,
        *ipv6,
        _DROP,
    ]
    if len(instructions) > INSTRUCTIONS_MAX:
        raise CannotFilter(f"{len(networks)} networks are too many: join some to larger ones")
    return b"".join(_INSTRUCTION.pack(*each) for each in instructions)


def admitted(code: bytes) -> list[Network]:
    """Whom a filter takes that :func:`program` has made; raises ValueError for another one."""
    instructions: list[Instruction] = list(_INSTRUCTION.iter_unpack(code))
    try:
        end = 3 + instructions[2][3] - 1
        found = [*_taken(instructions[3:end], 4), *_taken(instructions[end + 3 : -1], 6)]
    except (IndexError, OverflowError, ValueError) as error:
        raise ValueError("not a filter of ours") from error
    if program(found) != code:
        raise ValueError("not a filter of ours")
    return found


def _taken(instructions: Sequence[Instruction], version: int) -> Iterator[Network]:
    """What :func:`_takes` has been given."""
    kind, size = (ipaddress.IPv4Network, 4) if version == 4 else (ipaddress.IPv6Network, 16)
    address, mask, at, part = bytearray(size), bytearray(size), 0, 0
    for code, _, _, value in instructions:
        if code == _LOAD_WORD:
            at, part = value - _NETWORK_HEADER - _SOURCE[version], 0xFFFFFFFF
        elif code == _AND:
            part = value
        elif code == _JUMP_IF_EQUAL:
            address[at : at + 4], mask[at : at + 4] = value.to_bytes(4), part.to_bytes(4)
        elif code == _RETURN:
            yield kind((int.from_bytes(address), int.from_bytes(mask).bit_count()))
            address, mask = bytearray(size), bytearray(size)


def _takes(network: Network) -> list[Instruction]:
    """Take a packet from there; fall through otherwise."""
    wanted, mask = network.network_address.packed, network.netmask.packed
    tests: list[list[Instruction]] = []
    for at in range(0, len(mask), 4):
        part = int.from_bytes(mask[at : at + 4])
        load = (_LOAD_WORD, 0, 0, _NETWORK_HEADER + _SOURCE[network.version] + at)
        narrow = [] if part == 0xFFFFFFFF else [(_AND, 0, 0, part)]
        tests += [[load, *narrow]] if part else []
    values = [int.from_bytes(wanted[at : at + 4]) for at in range(0, 4 * len(tests), 4)]
    instructions: list[Instruction] = [_TAKE]
    for test, value in reversed(list(zip(tests, values, strict=True))):
        unequal = (_JUMP_IF_EQUAL, 0, len(instructions), value)
        instructions = [*test, unequal, *instructions]
    return instructions


def admit_only(networks: Sequence[str]) -> None:
    """From now on this process's TCP ports, those on the loopback aside, hear these networks
    alone; so do connections that have been accepted meanwhile. Call it again when there are new
    ports. No networks: everyone. Raises :class:`CannotFilter`.
    """
    if networks:
        _filter_ports(program(parse(networks)), lambda port: True)


def admit_others(networks: Sequence[str]) -> None:
    """Likewise, but only ports that hear some networks alone by now: not those that were opened
    since, such as the control port, whose clients prove who they are."""
    _filter_ports(program(parse(networks)), lambda port: bool(filter_of(port)))


def _filter_ports(code: bytes, is_meant: Callable[[socket.socket], bool]) -> None:
    ports: set[int] = set()
    for listening in (True, False):  # then connections, which are of a port that has its filter
        for tcp in own_tcp_sockets():
            host, port = tcp.getsockname()[:2]
            if listening != _listens(tcp):
                continue
            if not listening and port in ports:
                _attach(tcp, code)
            elif listening and not ipaddress.ip_address(host).is_loopback and is_meant(tcp):
                ports.add(port)
                _attach(tcp, code)


def own_tcp_sockets() -> Iterator[socket.socket]:
    """Of this process, each open until the next one is asked for."""
    for descriptor in own_sockets().values():
        with contextlib.suppress(OSError):  # closed meanwhile, or not of a kind that Python knows
            with socket.socket(fileno=os.dup(descriptor)) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6) and is_tcp(one):
                    yield one


def is_tcp(one: socket.socket) -> bool:
    return one.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL) == socket.IPPROTO_TCP


def _listens(tcp: socket.socket) -> bool:
    return bool(tcp.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _attach(tcp: socket.socket, code: bytes) -> None:
    buffer = ctypes.create_string_buffer(code, len(code))
    filters = struct.pack("@HP", len(code) // _INSTRUCTION.size, ctypes.addressof(buffer))
    try:
        tcp.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filters)
    except OSError as error:
        raise CannotFilter(
            f"port {tcp.getsockname()[1]} cannot be kept to the cluster's hosts "
            f"({error.strerror}): --peers-from any starts all the same, with ports that are open "
            "to everyone who reaches this host"
        ) from error


def filter_of(tcp: socket.socket) -> bytes:
    """The program of a socket's filter; empty if it has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    count = ctypes.c_uint32(0)  # of instructions, in both directions
    where = (tcp.fileno(), socket.SOL_SOCKET, _SO_GET_FILTER)
    if libc.getsockopt(*where, None, ctypes.byref(count)) or not count.value:
        return b""
    buffer = ctypes.create_string_buffer(count.value * _INSTRUCTION.size)
    if libc.getsockopt(*where, buffer, ctypes.byref(count)):
        raise OSError(ctypes.get_errno(), "the filter of a socket cannot be read")
    return buffer.raw
