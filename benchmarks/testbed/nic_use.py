"""How much the storage NICs did over time: byte counters, read ten times a second."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.testbed.network import Network

PERIOD_S = 0.1

Floats = NDArray[np.float64]


class NicUse(msgspec.Struct):
    """``times_s``: shape (samples,), from the job's begin; ``received_bytes``: shape
    (samples, nodes), since the job's begin."""

    nodes: list[str]
    times_s: Floats
    received_bytes: Floats

    def bytes_by_node(self) -> Floats:
        """Over the whole job; shape (nodes,)."""
        return np.asarray(self.received_bytes[-1])

    def max_over_average(self) -> float:
        """1 is perfect balance, the number of nodes is all by one."""
        by_node = self.bytes_by_node()
        return float(by_node.max() / by_node.mean())

    def middle_rates(self, share: float) -> Floats:
        """Bytes a second of each node over the middle ``share`` of the job; shape (nodes,)."""
        end_s = self.times_s[-1]
        cuts_s = np.array([(1 - share) / 2, (1 + share) / 2]) * end_s
        at_cuts = self._received_at(cuts_s)
        return np.asarray((at_cuts[1] - at_cuts[0]) / (cuts_s[1] - cuts_s[0]))

    def rates(self, window_s: float) -> tuple[Floats, Floats]:
        """Times and mean bytes a second in consecutive windows; shapes (windows,) and
        (windows, nodes)."""
        edges_s = np.arange(0, self.times_s[-1] + window_s, window_s)
        received = np.diff(self._received_at(edges_s), axis=0)
        return (edges_s[1:] + edges_s[:-1]) / 2, received / window_s

    def _received_at(self, times_s: Floats) -> Floats:
        """Bytes since the job's begin, between the samples; shape (times, nodes)."""
        columns = [np.interp(times_s, self.times_s, column) for column in self.received_bytes.T]
        return np.stack(columns, axis=1)


class _Samples:
    def __init__(self, network: Network, nodes: Sequence[str]) -> None:
        self._network = network
        self._nodes = nodes
        self._rows: list[tuple[float, list[int]]] = []

    def take(self) -> None:
        counters = self._network.storage_counters()
        received = [counters[node].received_bytes for node in self._nodes]
        self._rows.append((time.monotonic(), received))

    def use(self) -> NicUse:
        times_s = np.array([when for when, _ in self._rows])
        received = np.array([row for _, row in self._rows], np.float64)
        return NicUse(list(self._nodes), times_s - times_s[0], received - received[0])


@contextlib.asynccontextmanager
async def observed(network: Network, nodes: Sequence[str]) -> AsyncIterator[list[NicUse]]:
    """Sample while the body runs; then the list has its one :class:`NicUse`."""
    samples = _Samples(network, nodes)
    found: list[NicUse] = []

    async def sample() -> None:
        while True:
            samples.take()
            await asyncio.sleep(PERIOD_S)

    sampling = asyncio.create_task(sample())
    await asyncio.sleep(0)
    try:
        yield found
    finally:
        sampling.cancel()
        samples.take()
        found.append(samples.use())
