"""Samples as users see them at /metrics, but for the label of the process that reported them."""

from __future__ import annotations

from collections.abc import Iterable

from common.samples import Latencies, Sample


def by_name(samples: Iterable[Sample]) -> dict[str, float]:
    """Name with labels -> value; of a histogram every bucket, and its count and sum."""
    found: dict[str, float] = {}
    for sample in samples:
        assert sample.spelled not in found, f"{sample.spelled} is sent twice"
        if isinstance(sample.value, Latencies):
            found |= _of_histogram(sample.spelled, sample.value)
        else:
            found[sample.spelled] = sample.value
    return found


def _of_histogram(spelled: str, value: Latencies) -> dict[str, float]:
    name, _, labels = spelled.rstrip("}").partition("{")
    buckets = {
        f'{name}_bucket{{{labels},le="{bound:g}"}}': float(seen)
        for bound, seen in value.cumulative()
    }
    return buckets | {
        f"{name}_count{{{labels}}}": value.count,
        f"{name}_sum{{{labels}}}": value.sum_s,
    }
