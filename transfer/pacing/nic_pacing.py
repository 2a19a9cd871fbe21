"""Whether and how an agent's KV movement is paced, NIC by NIC; and what goes through each.

A NIC is the device to which the kernel's routes lead for an engine's address: when they lead
over another one, its pacer is used. With RDMA Mooncake chooses among several devices itself;
they count as one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from common.samples import Sample, sample
from transfer.mooncake import host_of
from transfer.pacing import nics
from transfer.pacing.pacer import Cap, FixedRate, Pacer, SpareRate
from transfer.pacing.route import device_to
from transfer.traffic.classes import CLASS_OF_KIND
from transfer.traffic.host import keeps_apart

log = logging.getLogger(__name__)

LOOPBACK = "lo"
UNKNOWN = "unknown"
RDMA = "rdma"
ROUTE_S = 0.5
"""Before a route is looked up again."""
PEERS_MAX = 4096
"""Addresses whose routes are remembered."""

Floor = Callable[[float, Callable[[str], bool]], float]
"""Bytes a second that must not be paced away at a moment, of the peers that are named."""


class NicBook:
    """Which NIC leads to a peer now. Thread-safe."""

    def __init__(
        self,
        is_local: Callable[[str], bool],
        is_rdma: bool,
        lookup: Callable[[str], str] = device_to,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._is_local, self._is_rdma = is_local, is_rdma
        self._lookup, self._clock = lookup, clock
        self._found: dict[str, tuple[float, str]] = {}

    def towards(self, session_id: str) -> str:
        """A device's name; LOOPBACK for this node's own processes."""
        if self._is_local(session_id):
            return LOOPBACK
        if self._is_rdma:
            return RDMA
        host, now = host_of(session_id), self._clock()
        until, device = self._found.get(host, (0.0, UNKNOWN))
        if now < until:
            return device
        try:
            new = self._lookup(host)
        except OSError as error:
            log.warning("no route peer=%s error=%s", host, error)
            new = UNKNOWN
        if until and new != device:
            log.warning("route has changed peer=%s nic=%s before=%s", host, new, device)
        if len(self._found) >= PEERS_MAX:
            self._found.clear()
        self._found[host] = now + ROUTE_S, new
        return new


class Pacing:
    """The pacers of an agent, made when the first bytes go through their NIC. Thread-safe.

    ``pace``: "auto" is on where nothing else keeps the classes apart: without RDMA, on NICs
    that have no queues for them. ``nic_bytes_per_s``: 0 is what the kernel says.
    """

    def __init__(
        self,
        pace: str | float,
        book: NicBook,
        floor: Floor,
        nic_bytes_per_s: float = 0.0,
        rdma_devices: str = "",
        has_classes: Callable[[str], bool] = keeps_apart,
        sysfs: Path = nics.SYSFS,
    ) -> None:
        self._pace = pace
        self._book = book
        self._floor = floor
        self._nic_bytes_per_s = nic_bytes_per_s
        self._rdma = [nic for nic in nics.usable(nics.rdma_nics(sysfs), rdma_devices)]
        self._has_classes = has_classes
        self._sysfs = sysfs
        self._lock = threading.Lock()
        self._pacers: dict[str, Pacer | None] = {}

    def towards(self, session_id: str) -> Pacer | None:
        """None: bytes to this peer are not paced."""
        if self._pace == "off":
            return None
        device = self._book.towards(session_id)
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
            return self._floor(now, lambda session: self._book.towards(session) == device)

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


class MovedBytes:
    """What has moved by NIC: each report's growth counts for the NIC in use by then."""

    def __init__(self, book: NicBook, kind: str) -> None:
        self._book = book
        self._kind = kind
        # What an agent reads is sent by an engine, in the engine's class.
        self._classes = {
            "write": CLASS_OF_KIND[kind].value,
            "read": CLASS_OF_KIND["engine"].value,
        }
        self._before: dict[tuple[str, str], int] = {}
        self._by_nic: Counter[tuple[str, str, str]] = Counter()

    def samples(self, moved: Mapping[tuple[str, str], int]) -> list[Sample]:
        """``moved``: (operation, address of the peer) -> bytes so far."""
        for (operation, host), nbytes in moved.items():
            grown = nbytes - self._before.get((operation, host), 0)
            if grown:
                self._by_nic[operation, self._book.towards(f"{host}:0"), host] += grown
        self._before = dict(moved)
        return [self._sample(*moved_to, n) for moved_to, n in self._by_nic.items()]

    def _sample(self, operation: str, nic: str, peer: str, nbytes: int) -> Sample:
        labels = {"class": self._classes[operation], "operation": operation, "nic": nic}
        return sample(
            "agent_moved_bytes_total" if self._kind == "agent" else "engine_moved_bytes_total",
            nbytes,
            **labels,
            peer=peer,
        )


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
