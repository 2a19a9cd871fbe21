"""The network device over which a host's ranks meet those of others."""

from __future__ import annotations

import psutil


class NoSuchAddress(Exception):
    """No device of this host has it."""


def device_of(address: str) -> str:
    """Name of the device that has an address, such as ``eth0``. Raises :class:`NoSuchAddress`."""
    for device, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return device
    raise NoSuchAddress(f"no network device of this host has the address {address}")
