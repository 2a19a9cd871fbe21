"""Which NIC leads to a peer, and what has gone through each.

A NIC is the device to which the kernel's routes lead for a peer's address: when they lead over
another one, that one counts. With RDMA Mooncake chooses among several devices itself; they
count as one.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping

from common.samples import Sample, sample
from transfer.mooncake import host_of
from transfer.pacing.route import device_to
from transfer.traffic.classes import CLASS_OF_KIND

log = logging.getLogger(__name__)

LOOPBACK = "lo"
UNKNOWN = "unknown"
RDMA = "rdma"
ROUTE_S = 0.5
"""Before a route is looked up again."""
PEERS_MAX = 4096
"""Addresses whose routes are remembered."""


class PeerNics:
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

    def nic_towards(self, session_id: str) -> str:
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


class MovedBytes:
    """What has moved by NIC: each report's growth counts for the NIC in use by then."""

    def __init__(self, nics: PeerNics, kind: str) -> None:
        self._nics = nics
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
                self._by_nic[operation, self._nics.nic_towards(f"{host}:0"), host] += grown
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
