"""A histogram of latencies, in Prometheus's sense."""

from __future__ import annotations

from bisect import bisect_left

import msgspec

BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Upper bounds; what took longer is counted in ``count`` alone."""


class Latencies(msgspec.Struct):
    """``counts[i]``: observations in bucket i alone."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * len(BUCKETS_S))
    count: int = 0
    sum_s: float = 0.0

    def note(self, seconds: float) -> None:
        self.count += 1
        self.sum_s += seconds
        bucket = bisect_left(BUCKETS_S, seconds)
        if bucket < len(BUCKETS_S):
            self.counts[bucket] += 1

    def copy(self) -> Latencies:
        return Latencies(list(self.counts), self.count, self.sum_s)

    def quantile_s(self, part: float) -> float | None:
        """Upper bound of the bucket in which that part of all ends; None if there are none,
        or if it is beyond the last."""
        seen = 0
        for bound, count in zip(BUCKETS_S, self.counts, strict=True):
            seen += count
            if self.count and seen >= part * self.count:
                return bound
        return None

    def samples(self, name: str, labels: str) -> dict[str, float]:
        """Prometheus samples of a histogram; ``labels`` without braces."""
        samples, seen = {}, 0
        for bound, count in zip(BUCKETS_S, self.counts, strict=True):
            seen += count
            samples[f'{name}_bucket{{{labels},le="{bound:g}"}}'] = float(seen)
        samples[f'{name}_bucket{{{labels},le="+Inf"}}'] = float(self.count)
        samples[f"{name}_count{{{labels}}}"] = float(self.count)
        samples[f"{name}_sum{{{labels}}}"] = self.sum_s
        return samples
