"""Where this host is, as the others see it."""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import logging
import os
import socket
import struct
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from launch.settings import BadConfig

log = logging.getLogger(__name__)

RESOLVE_AGAIN_S = 3.0
_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B
_NAME_BYTES_MAX = 15
HOST_VARIABLE = "SGLANG_HOST_IP"


def own_address(asked: str, gateways: Sequence[str]) -> str:
    """``asked``, or what the environment says, or the address from which packets leave for the
    gateway. Raises :class:`BadConfig` for one that is not this host's: SGLang binds it."""
    named = asked or os.environ.get(HOST_VARIABLE, "")
    try:
        address = _resolved(named) if named else _source_towards(gateways[0])
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError as error:
        raise BadConfig(
            f"--host {named or 'towards ' + gateways[0]}: {error.strerror}; give the address of "
            "this host that the other hosts reach."
        ) from error
    return address


async def first_host(meeting: str, timeout_s: float) -> str:
    """Address of the host in ``HOST:PORT``, whose name may lead nowhere yet, as that of a Pod that
    starts. Raises :class:`BadConfig` after ``timeout_s``."""
    name, give_up_at = meeting.rpartition(":")[0], time.monotonic() + timeout_s
    while True:
        try:
            return await asyncio.to_thread(_resolved, name)
        except OSError as error:
            trouble = f"--dist-init-addr {name}: {error.strerror}."
            if time.monotonic() > give_up_at:
                raise BadConfig(trouble) from error
            log.warning("waiting for a name: %s", trouble)
        await asyncio.sleep(RESOLVE_AGAIN_S)


def network_of(address: str) -> str:
    """The network that an address of this host is in, such as 10.0.0.0/16; the address alone, if
    no interface has it."""
    for _, name in socket.if_nameindex():
        if _asked(name, _SIOCGIFADDR) == address:
            mask = _asked(name, _SIOCGIFNETMASK)
            return str(ipaddress.ip_network(f"{address}/{mask}", strict=False))
    return address


def _resolved(name: str) -> str:
    return socket.gethostbyname(name)


def _source_towards(url: str) -> str:
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting sends nothing
        probe.connect((_resolved(parts.hostname or ""), parts.port or 80))
        return str(probe.getsockname()[0])


def _asked(interface: str, request: int) -> str:
    """An address that the kernel knows of an interface; empty: it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        name = struct.pack("256s", interface.encode()[:_NAME_BYTES_MAX])
        try:
            answer = fcntl.ioctl(probe.fileno(), request, name)
        except OSError:  # no IPv4 address
            return ""
    return socket.inet_ntoa(answer[20:24])
