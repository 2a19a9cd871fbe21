"""How fast a device works while it has something to do."""

from __future__ import annotations

import math

SAMPLE_S = 0.02
"""Shorter spans, and spans in which nothing was done yet, are added up first."""
AVERAGE_S = 1.0
"""Working time over which a sample's weight falls to 1/e; a longer silence is a sample."""


class RateMeter:
    """Exponential average of bytes per second over the time with work outstanding."""

    def __init__(self) -> None:
        self.bytes_per_s = 0.0
        """0 until something was measured."""
        self._bytes = 0
        self._since_s: float | None = None

    def note(self, now: float, done_bytes: int, outstanding: bool) -> None:
        """``done_bytes`` were moved since the last call; are there more to come?"""
        if self._since_s is None:
            self._since_s = now if outstanding else None
            return
        self._bytes += done_bytes
        span_s = now - self._since_s
        enough_s = SAMPLE_S if self._bytes else AVERAGE_S
        if span_s >= enough_s or (span_s > 0 and self._bytes and not outstanding):
            self._sample(self._bytes / span_s, span_s)
            self._bytes, self._since_s = 0, now
        if not outstanding:
            self._bytes, self._since_s = 0, None

    def _sample(self, rate: float, span_s: float) -> None:
        if not self.bytes_per_s:
            self.bytes_per_s = rate
            return
        self.bytes_per_s += (1 - math.exp(-span_s / AVERAGE_S)) * (rate - self.bytes_per_s)
