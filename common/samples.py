"""What an agent or an engine reports of the metrics that common/metrics.py declares."""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import accumulate

import msgspec

from common.metrics import LATENCY_BUCKETS_S, METRICS, PREFIX, Kind, Metric

log = logging.getLogger(__name__)


class UndeclaredMetric(Exception):
    """No metric of that name, with these labels, of that kind, is in common/metrics.py."""

    def __init__(self, name: str, labels: tuple[str, ...]) -> None:
        super().__init__(f"{name} with labels {labels}; declared: {METRICS.get(name)}")


class Latencies(msgspec.Struct):
    """A histogram: ``counts[i]`` observations in the bucket up to ``LATENCY_BUCKETS_S[i]`` alone;
    what took longer is counted in ``count`` alone."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * len(LATENCY_BUCKETS_S))
    count: int = 0
    sum_s: float = 0.0

    def note(self, seconds: float) -> None:
        self.count += 1
        self.sum_s += seconds
        bucket = bisect_left(LATENCY_BUCKETS_S, seconds)
        if bucket < len(LATENCY_BUCKETS_S):
            self.counts[bucket] += 1

    def copy(self) -> Latencies:
        return Latencies(list(self.counts), self.count, self.sum_s)

    def quantile_s(self, part: float) -> float | None:
        """Upper bound of the bucket in which that part of all ends; None if there are none,
        or if it is beyond the last."""
        for bound, seen in self.cumulative():
            if self.count and seen >= part * self.count:
                return bound if bound < math.inf else None
        return None

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """Upper bound of a bucket -> observations up to there; the last bound is infinity."""
        yield from zip(LATENCY_BUCKETS_S, accumulate(self.counts), strict=True)
        yield math.inf, self.count


class Sample(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One value of one metric, as it crosses the network."""

    metric: str
    labels: tuple[str, ...]
    """Their values, in the order in which the metric declares them."""
    value: float | Latencies

    @property
    def spelled(self) -> str:
        """As at ``/metrics``, but for the label of the process that reports it."""
        names = METRICS[self.metric].labels
        pairs = [f'{n}="{v}"' for n, v in zip(names, self.labels, strict=True)]
        return f"{PREFIX}{self.metric}" + (f"{{{','.join(pairs)}}}" if pairs else "")

    def declared(self) -> Metric | None:
        """Its metric; None for a sample that a process of another build has sent."""
        metric = METRICS.get(self.metric)
        if metric is None or len(self.labels) != len(metric.labels):
            return None
        buckets = len(self.value.counts) if isinstance(self.value, Latencies) else 0
        return metric if buckets == len(metric.buckets) else None


_NUMBERS = {m.name: m.labels for m in METRICS.values() if m.kind is not Kind.HISTOGRAM}
_HISTOGRAMS = {m.name: m.labels for m in METRICS.values() if m.kind is Kind.HISTOGRAM}


def sample(name: str, value: float, /, **labels: str) -> Sample:
    """A value of a declared counter or gauge; raises :class:`UndeclaredMetric`. Give the labels
    in the table's order, and write the name out: a test looks for each in the code."""
    if _NUMBERS.get(name) != tuple(labels):
        raise UndeclaredMetric(name, tuple(labels))
    return Sample(name, tuple(labels.values()), value)


def histogram(name: str, value: Latencies, /, **labels: str) -> Sample:
    """The same for a histogram."""
    if _HISTOGRAMS.get(name) != tuple(labels):
        raise UndeclaredMetric(name, tuple(labels))
    return Sample(name, tuple(labels.values()), value)


def reported(samples: Iterable[Sample]) -> list[Sample]:
    """What a heartbeat carries: where one is not declared, those before it, as a process that
    falls silent for the sake of a metric would be taken for dead."""
    ready: list[Sample] = []
    try:
        ready.extend(samples)
    except UndeclaredMetric as error:
        _complain(str(error))
    return ready


@cache
def _complain(error: str) -> None:
    """Once: a heartbeat comes five times a second."""
    log.error("metrics are missing from the reports: %s", error)
