"""The machine's network devices and GPUs, as an operator should know them.

RDMA devices, GPUs and PCI come from sysfs, whose root can be another folder (a recorded
tree). Network devices come from the kernel's own calls: in a network namespace ``/sys``
may show those of another.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from pathlib import Path

import msgspec
import psutil

from transfer.pacing.nics import SYSFS, Gpu, Nic, gpus, numa_node, rdma_nics, sysfs_text

_RATE_MBIT_MAX = 1 << 24
"""Greater ones are a driver's way to say that it does not know."""


class Link(msgspec.Struct, frozen=True):
    """A network device as the kernel sees it from this network namespace."""

    is_up: bool
    rate_mbit: int
    """0 where the driver does not say."""
    mtu: int
    addresses: list[str] = []


class NetDevice(msgspec.Struct, frozen=True):
    name: str
    link: Link
    numa_node: int
    """-1 for a virtual device, or if the machine has one only."""


class Gid(msgspec.Struct, frozen=True):
    """One of an RDMA port's addresses."""

    index: int
    address: str
    kind: str
    """"IB/RoCE v1" or "RoCE v2"."""


class RdmaPort(msgspec.Struct, frozen=True):
    number: int
    is_ethernet: bool
    is_active: bool
    rate: str
    """In the driver's words, such as "400 Gb/sec (4X NDR)"."""
    net_device: str
    """"" for an InfiniBand port without one."""
    gids: list[Gid]
    forced_traffic_class: int | None
    """A driver's setting that overrides the traffic class of every connection."""


class RdmaDevice(msgspec.Struct, frozen=True):
    nic: Nic
    ports: list[RdmaPort]


class Machine(msgspec.Struct, frozen=True):
    net: list[NetDevice]
    rdma: list[RdmaDevice]
    gpus: list[Gpu]

    @property
    def network(self) -> str:
        """ "infiniband", "roce" or "ethernet": the best that there is in working order."""
        ports = [port for device in self.rdma for port in device.ports if port.is_active]
        if any(not port.is_ethernet for port in ports):
            return "infiniband"
        return "roce" if ports else "ethernet"

    def net_device(self, name: str) -> NetDevice | None:
        return next((device for device in self.net if device.name == name), None)


def read_machine(sysfs: Path = SYSFS, links: Mapping[str, Link] | None = None) -> Machine:
    """``links``: network devices by name; by default those of this network namespace."""
    links = read_links() if links is None else links
    return Machine(
        [
            NetDevice(name, link, numa_node(sysfs / "class/net" / name / "device"))
            for name, link in sorted(links.items())
        ],
        [_rdma_device(sysfs, nic) for nic in rdma_nics(sysfs)],
        gpus(sysfs),
    )


def read_links() -> dict[str, Link]:
    """Of this network namespace, the loopback aside."""
    addresses = psutil.net_if_addrs()
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: Link(
            found.isup,
            found.speed if 0 < found.speed < _RATE_MBIT_MAX else 0,
            found.mtu,
            [entry.address for entry in addresses.get(name, []) if entry.family in families],
        )
        for name, found in psutil.net_if_stats().items()
        if name != "lo"
    }


def _rdma_device(sysfs: Path, nic: Nic) -> RdmaDevice:
    folder = sysfs / "class/infiniband" / nic.name
    ports = sorted((folder / "ports").glob("[0-9]*"), key=lambda path: int(path.name))
    return RdmaDevice(nic, [_rdma_port(folder, path) for path in ports])


def _rdma_port(device: Path, folder: Path) -> RdmaPort:
    gids = []
    for path in sorted((folder / "gids").glob("*"), key=lambda path: int(path.name)):
        address = sysfs_text(path)
        if address.replace(":", "").strip("0"):  # an unused entry is all zeros
            kind = sysfs_text(folder / "gid_attrs/types" / path.name)
            gids.append(Gid(int(path.name), address, kind))
    owners = [sysfs_text(folder / "gid_attrs/ndevs" / str(gid.index)) for gid in gids]
    beside = [path.name for path in (device / "device/net").glob("*")]
    # NVIDIA's driver: "Global tclass=106", or -1.
    forced = re.search(r"-?\d+", sysfs_text(device / "tc" / folder.name / "traffic_class"))
    return RdmaPort(
        int(folder.name),
        sysfs_text(folder / "link_layer") == "Ethernet",
        sysfs_text(folder / "state").endswith("ACTIVE"),
        sysfs_text(folder / "rate"),
        next((name for name in [*owners, *beside] if name), ""),
        gids,
        int(forced[0]) if forced and int(forced[0]) >= 0 else None,
    )
