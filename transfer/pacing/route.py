"""Which network device leads to an address: the kernel's own answer (rtnetlink).

Its routes decide, also between several NICs; when one fails, they lead over another.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct

_RTM_NEWROUTE, _RTM_GETROUTE = 24, 26
_NLM_F_REQUEST = 1
_RTA_DST, _RTA_OIF = 1, 4
_HEADER = struct.Struct("=IHHII")
_ROUTE = struct.Struct("=BBBBBBBBI")
_ATTRIBUTE = struct.Struct("=HH")
_ANSWER_BYTES_MAX = 8192
TIMEOUT_S = 1.0


def device_to(host: str) -> str:
    """Such as ``eth0``, or ``lo`` for an address of this machine. Raises ``OSError`` if there is
    no way, or ``host`` is no address."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError as error:
        raise OSError(str(error)) from error
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.settimeout(TIMEOUT_S)
        kernel.send(_question(address))
        return _device(kernel.recv(_ANSWER_BYTES_MAX))


def _question(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bytes:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    packed = address.packed
    route = _ROUTE.pack(family, 8 * len(packed), 0, 0, 0, 0, 0, 0, 0)
    body = route + _ATTRIBUTE.pack(_ATTRIBUTE.size + len(packed), _RTA_DST) + packed
    return _HEADER.pack(_HEADER.size + len(body), _RTM_GETROUTE, _NLM_F_REQUEST, 1, 0) + body


def _device(answer: bytes) -> str:
    length, kind, *_ = _HEADER.unpack_from(answer)
    if kind != _RTM_NEWROUTE:
        code = -struct.unpack_from("=i", answer, _HEADER.size)[0]
        raise OSError(code, os.strerror(code))
    at = _HEADER.size + _ROUTE.size
    while at < length:
        size, name = _ATTRIBUTE.unpack_from(answer, at)
        if name == _RTA_OIF:
            return socket.if_indextoname(struct.unpack_from("=i", answer, at + 4)[0])
        at += (size + 3) & ~3
    raise OSError("the kernel names no device for the route")
