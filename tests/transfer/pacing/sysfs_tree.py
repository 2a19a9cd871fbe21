"""Trees of sysfs as machines with RDMA have them, cut down to what is read of them.

Written after the vendors' descriptions: no such machine was at hand.
"""

from __future__ import annotations

from pathlib import Path

# NVIDIA HGX H100: two sockets, four PCI switches each, one GPU and one 400 Gbit/s NIC behind
# each; and one NIC for storage on the first socket.
HGX_SWITCHES = (
    ("15", 0),
    ("26", 0),
    ("3f", 0),
    ("58", 0),
    ("97", 1),
    ("a7", 1),
    ("c0", 1),
    ("d9", 1),
)
NDR = "400 Gb/sec (4X NDR)"


def pci_device(root: Path, path: str, numa: int, vendor: str, kind: str) -> Path:
    """``path``: below ``/sys/devices``."""
    folder = root / "devices" / path
    folder.mkdir(parents=True)
    (folder / "numa_node").write_text(f"{numa}\n")
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "class").write_text(f"{kind}\n")
    entry = root / "bus/pci/devices" / folder.name
    entry.parent.mkdir(parents=True, exist_ok=True)
    entry.symlink_to(folder)
    return folder


def gpu(root: Path, path: str, numa: int) -> None:
    pci_device(root, path, numa, "0x10de", "0x030200")


def rdma_nic(
    root: Path, name: str, path: str, numa: int, state: str = "4: ACTIVE", words: int = 0
) -> None:
    device = pci_device(root, path, numa, "0x15b3", "0x020700")
    folder = root / "class/infiniband" / name
    port = folder / "ports/1"
    (port / "counters").mkdir(parents=True)
    (folder / "device").symlink_to(device)
    (port / "rate").write_text(f"{NDR}\n")
    (port / "state").write_text(f"{state}\n")
    (port / "counters/port_xmit_data").write_text(f"{words}\n")


def hgx(root: Path, down: str = "") -> Path:
    """``down``: a NIC without a link."""
    for number, (bus, numa) in enumerate(HGX_SWITCHES):
        switch = f"pci0000:{bus}/0000:{bus}:01.0/0000:{bus[0]}{int(bus[1], 16):x}:00.0"
        gpu(root, f"{switch}/0000:{bus}:10.0/0000:{bus}:11.0", numa)
        name = f"mlx5_{number}"
        state = "1: DOWN" if name == down else "4: ACTIVE"
        rdma_nic(root, name, f"{switch}/0000:{bus}:20.0/0000:{bus}:21.0", numa, state, 250)
    rdma_nic(root, "mlx5_8", "pci0000:20/0000:20:01.0/0000:21:00.0", 0)
    for node in (0, 1):
        (root / f"devices/system/node/node{node}").mkdir(parents=True)
    return root


def one_socket(root: Path) -> Path:
    """A server with two GPUs and two NICs below one root, without a switch."""
    for number in (1, 2):
        gpu(root, f"pci0000:00/0000:00:0{number}.0/0000:0{number}:00.0", -1)
        rdma_nic(root, f"rdma{number}", f"pci0000:00/0000:00:0{number}.4/0000:8{number}:00.0", -1)
    return root


def ethernet(root: Path, device: str, mbit: int | None) -> Path:
    """None: the driver refuses to say (reading gives EINVAL, here: there is no such file)."""
    folder = root / "class/net" / device
    folder.mkdir(parents=True)
    if mbit is not None:
        (folder / "speed").write_text(f"{mbit}\n")
    return root
