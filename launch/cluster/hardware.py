"""What the machine has: the device to compute on and the transport for KV."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from launch.flags.node import NodeSettings
from launch.settings import BadConfig

_RDMA_DEVICES = Path("/sys/class/infiniband")
_NVIDIA_DRIVER = Path("/proc/driver/nvidia")


@dataclass(frozen=True)
class Hardware:
    """What ``--device auto`` and ``--transfer auto`` came to, and why."""

    device: str
    """"cuda" or "cpu"."""
    transfer: str
    """"rdma" or "tcp"."""
    reason: str
    """Why this transport: a sentence for the start-up summary."""
    gpus: int | None = None
    """How many engines may use here; None: not counted."""


def detect(config: NodeSettings) -> Hardware:
    """Resolve both ``auto`` settings; raises :class:`BadConfig` for what cannot be."""
    device = config.device
    if device != "cpu":
        has_cuda = _has_cuda()
        if device == "cuda" and not has_cuda:
            raise BadConfig("--device cuda: torch finds no CUDA device here; use --device cpu.")
        device = "cuda" if has_cuda else "cpu"
    hardware = choose_transfer(config.transfer, device, rdma_devices())
    return replace(hardware, gpus=_gpus()) if device == "cuda" else hardware


def choose_transfer(asked: str, device: str, devices: list[str]) -> Hardware:
    """Pure part of :func:`detect`. ``devices``: names of the machine's RDMA devices."""
    if asked == "tcp":
        return Hardware(device, "tcp", "asked for by --transfer.")
    if asked == "rdma":
        if not devices:
            raise BadConfig("--transfer rdma: the kernel lists no RDMA device; use --transfer tcp.")
        return Hardware(device, "rdma", "asked for by --transfer.")
    if not devices:
        return Hardware(device, "tcp", "the kernel lists no RDMA device.")
    if device == "cpu":
        return Hardware(device, "tcp", f"engines compute on CPU; {devices[0]} is left alone.")
    return Hardware(device, "rdma", f"RDMA devices found: {', '.join(devices)}.")


def rdma_devices() -> list[str]:
    """Names such as ``mlx5_0``."""
    return sorted(entry.name for entry in _RDMA_DEVICES.glob("*"))


def _has_cuda() -> bool:
    if not _NVIDIA_DRIVER.exists():  # spares the launcher the import of torch
        return False
    import torch

    return bool(torch.cuda.is_available())


def _gpus() -> int:
    import torch

    return int(torch.cuda.device_count())
