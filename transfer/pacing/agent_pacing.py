"""Whether and how an agent's KV movement is paced: a pacer for each NIC that needs one.

When the routes lead over another NIC (:mod:`transfer.pacing.peer_nics`), its pacer is used.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from common.samples import Sample, sample
from transfer.pacing import nics
from transfer.pacing.pacer import Cap, FixedRate, Pace, Pacer, SpareRate
from transfer.pacing.peer_nics import LOOPBACK, RDMA, UNKNOWN, PeerNics
from transfer.traffic.host import keeps_apart

log = logging.getLogger(__name__)

Floor = Callable[[float, Callable[[str], bool]], float]
"""Bytes a second that must not be paced away at a moment, of the peers that are named."""


class PaceSettings(msgspec.Struct, frozen=True):
    """What an operator says of it."""

    pace: Pace
    nic_bytes_per_s: float = 0.0
    """Of each NIC; 0 is what the kernel says."""
    rdma_devices: str = ""
    """Comma-separated; empty means all."""


class AgentPacing:
    """The pacers of an agent, made when the first bytes go through their NIC. Thread-safe.

    "auto" is on where nothing else keeps the classes apart: without RDMA, on NICs that have no
    queues for them (``has_classes``).
    """

    def __init__(
        self,
        settings: PaceSettings,
        peer_nics: PeerNics,
        floor: Floor,
        has_classes: Callable[[str], bool] = keeps_apart,
        sysfs: Path = nics.SYSFS,
    ) -> None:
        self._pace = settings.pace
        self._nic_bytes_per_s = settings.nic_bytes_per_s
        self._peer_nics = peer_nics
        self._floor = floor
        self._rdma = nics.usable(nics.rdma_nics(sysfs), settings.rdma_devices)
        self._has_classes = has_classes
        self._sysfs = sysfs
        self._lock = threading.Lock()
        self._pacers: dict[str, Pacer | None] = {}

    def pacer_towards(self, session_id: str) -> Pacer | None:
        """None: bytes to this peer are not paced."""
        if self._pace == "off":
            return None
        device = self._peer_nics.nic_towards(session_id)
        if device in (LOOPBACK, UNKNOWN):
            return None
        with self._lock:
            if device not in self._pacers:
                self._pacers[device] = self._make(device)
            return self._pacers[device]

    def pacers(self) -> Mapping[str, Pacer]:
        """By NIC."""
        with self._lock:
            return {nic: pacer for nic, pacer in self._pacers.items() if pacer is not None}

    def _make(self, device: str) -> Pacer | None:
        cap = self._cap(device)
        if cap is None:
            return None

        def floor(now: float) -> float:
            return self._floor(now, lambda session: self._peer_nics.nic_towards(session) == device)

        return Pacer(cap, floor)

    def _cap(self, device: str) -> Cap | None:
        if isinstance(self._pace, float):
            log.info("KV movement is paced nic=%s bytes_per_s=%.0f", device, self._pace)
            return FixedRate(self._pace)
        if self._pace == "auto" and (device == RDMA or self._has_classes(device)):
            log.info("KV movement is not paced nic=%s: it has traffic classes", device)
            return None
        rate = self._nic_bytes_per_s or self._link_rate(device)
        if not rate:
            log.warning(
                "KV movement is not paced nic=%s: the kernel does not know the NIC's rate, give it "
                "as --nic-bytes-per-s",
                device,
            )
            return None
        log.info(
            "KV movement is paced nic=%s to what others leave of bytes_per_s=%.0f", device, rate
        )
        return SpareRate(rate, lambda: self._sent_bytes(device))

    def _link_rate(self, device: str) -> float | None:
        if device == RDMA:
            return sum(nic.bytes_per_s for nic in self._rdma)
        return nics.link_bytes_per_s(device, self._sysfs)

    def _sent_bytes(self, device: str) -> int:
        if device == RDMA:
            return nics.rdma_sent_bytes([nic.name for nic in self._rdma], self._sysfs)
        return nics.link_sent_bytes(device)


def pacer_samples(pacers: Mapping[str, Pacer]) -> Iterator[Sample]:
    """State of every pacer."""
    for nic, pacer in pacers.items():
        stats = pacer.stats()
        yield from [
            sample("agent_pacer_bytes_per_second", stats.rate, nic=nic),
            sample("agent_pacer_floor_bytes_per_second", stats.floor_rate, nic=nic),
            sample("agent_pacer_others_bytes_per_second", stats.others_rate, nic=nic),
            sample("agent_pacer_waiting", stats.waiting, nic=nic),
            sample("agent_pacer_wait_seconds_total", stats.waited_s_total, nic=nic),
            sample("agent_pacer_bytes_total", stats.bytes_total, nic=nic),
            sample("agent_pacer_floor_hits_total", stats.floor_hits_total, nic=nic),
        ]
