"""The NICs of this machine, and which of them are near: read from sysfs.

RDMA devices have names such as ``mlx5_0``, network devices such as ``eth0``. Nearness is that
of PCI: two devices behind one switch can talk without passing the CPU.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

SYSFS = Path("/sys")
_NET_DEV = Path("/proc/self/net/dev")
_RDMA = "class/infiniband"
_GPU_CLASSES = ("0x0300", "0x0302")
"""PCI classes: VGA and 3D controller."""
_NVIDIA = "0x10de"
_VARIABLE = "MC_CUSTOM_TOPO_JSON"
_WORD_BYTES = 4
"""InfiniBand counts data in words."""


class Nic(msgspec.Struct, frozen=True):
    """An RDMA device; of its ports, the first."""

    name: str
    bytes_per_s: float
    is_active: bool
    numa_node: int
    """-1 if the machine has one only."""
    pci_path: tuple[str, ...]
    """From the root to the device: ``("pci0000:10", "0000:10:01.0", ...)``."""


class Gpu(msgspec.Struct, frozen=True):
    """``index``: in order of PCI addresses, as with CUDA_DEVICE_ORDER=PCI_BUS_ID."""

    index: int
    numa_node: int
    pci_path: tuple[str, ...]


# ---- RDMA devices and GPUs --------------------------------------------------------------


def rdma_nics(sysfs: Path = SYSFS) -> list[Nic]:
    """By name; empty on a machine without any."""
    return [_rdma_nic(folder) for folder in sorted((sysfs / _RDMA).glob("*"))]


def _rdma_nic(folder: Path) -> Nic:
    ports = sorted((folder / "ports").glob("*"))
    rate, state = (
        ("", "") if not ports else (sysfs_text(ports[0] / "rate"), sysfs_text(ports[0] / "state"))
    )
    return Nic(
        folder.name,
        float(rate.split()[0]) * 1e9 / 8 if rate else 0.0,
        "ACTIVE" in state,
        numa_node(folder / "device"),
        _pci_path(folder / "device"),
    )


def gpus(sysfs: Path = SYSFS) -> list[Gpu]:
    """NVIDIA's, in order of PCI addresses."""
    found = [
        device
        for device in sorted((sysfs / "bus/pci/devices").glob("*"))
        if sysfs_text(device / "vendor") == _NVIDIA
        and sysfs_text(device / "class").startswith(_GPU_CLASSES)
    ]
    return [Gpu(i, numa_node(device), _pci_path(device)) for i, device in enumerate(found)]


def rdma_sent_bytes(names: Iterable[str], sysfs: Path = SYSFS) -> int:
    """Counted by the devices' first ports."""
    return sum(
        _WORD_BYTES * int(sysfs_text(port / "counters/port_xmit_data") or 0)
        for name in names
        for port in sorted((sysfs / _RDMA / name / "ports").glob("*"))[:1]
    )


def sysfs_text(path: Path) -> str:
    """Empty if it cannot be read: sysfs says so, for what a device does not know."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def numa_node(device: Path) -> int:
    return int(sysfs_text(device / "numa_node") or -1)


def _pci_path(device: Path) -> tuple[str, ...]:
    parts = device.resolve().parts
    roots = [n for n, part in enumerate(parts) if part.startswith("pci")]
    return parts[roots[0] :] if roots else ()


# ---- who is near whom -------------------------------------------------------------------


def distance(nic: Nic, gpu: Gpu) -> tuple[int, int]:
    """Smaller is nearer: first, whether they are on other NUMA nodes; then the bridges between
    them, counted from their last common one."""
    common = len(os.path.commonprefix([nic.pci_path, gpu.pci_path]))
    apart = len(nic.pci_path) + len(gpu.pci_path) - 2 * common
    if not common:
        apart += 1 << 16
    return int(nic.numa_node != gpu.numa_node), apart


def nearest(nics: Sequence[Nic], gpu: Gpu) -> list[str]:
    """The NICs that are nearer to the GPU than all others."""
    if not nics:
        return []
    least = min(distance(nic, gpu) for nic in nics)
    return [nic.name for nic in nics if distance(nic, gpu) == least]


def usable(nics: Sequence[Nic], wanted: str) -> list[Nic]:
    """Those with a link, of the comma-separated ``wanted``, or of all if it is empty."""
    names = {name.strip() for name in wanted.split(",") if name.strip()}
    return [nic for nic in nics if nic.is_active and (not names or nic.name in names)]


Topology = dict[str, tuple[list[str], list[str]]]
"""Mooncake's NIC priority matrix: memory (``cpu:0``) -> NICs to use, and those to go over to
when a transfer through them fails."""


def agent_topology(nics: Sequence[Nic], own_gpus: Sequence[Gpu], numa_nodes: int) -> Topology:
    """For an agent: the NICs near its own engine's GPUs, wherever in DRAM the bytes are, so
    that agents of one machine do not meet on a NIC; the others if those fail."""
    near = {name for gpu in own_gpus for name in nearest(nics, gpu)}
    first = [nic.name for nic in nics if nic.name in near or not near]
    rest = [nic.name for nic in nics if nic.name not in first]
    return {f"cpu:{node}": (first, rest) for node in range(numa_nodes)}


def numa_node_count(sysfs: Path = SYSFS) -> int:
    """At least 1."""
    return max(1, len(list((sysfs / "devices/system/node").glob("node[0-9]*"))))


@contextmanager
def given_to_mooncake(topology: Topology) -> Iterator[None]:
    """An engine that starts inside uses this topology (its classic form reads the file that
    MC_CUSTOM_TOPO_JSON names, and takes no device filter then). An operator's own wins."""
    if not any(topology.values()) or _VARIABLE in os.environ:
        yield
        return
    with tempfile.NamedTemporaryFile("w", prefix="dualpath-nics-", suffix=".json") as file:
        json.dump(topology, file)
        file.flush()
        os.environ[_VARIABLE] = file.name
        try:
            yield
        finally:
            del os.environ[_VARIABLE]


# ---- network devices --------------------------------------------------------------------


def link_bytes_per_s(device: str, sysfs: Path = SYSFS) -> float | None:
    """What the driver says of the link; None where it does not know (virtual machines)."""
    mbit = int(sysfs_text(sysfs / "class/net" / device / "speed") or -1)
    return mbit * 1e6 / 8 if mbit > 0 else None


def link_sent_bytes(device: str, net_dev: Path = _NET_DEV) -> int:
    """Since the device exists, of all processes. Raises ``OSError`` if there is none."""
    for line in net_dev.read_text().splitlines():
        name, _, fields = line.partition(":")
        if name.strip() == device:
            return int(fields.split()[8])
    raise OSError(f"there is no network device {device}")
