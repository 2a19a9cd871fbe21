"""How fast this machine is, so that an absolute goal means the same on another one.

Machines differ by two in what a core does in a second. Every CPU time that a benchmark holds
against an absolute goal is multiplied by :attr:`Yardstick.scale`, taken in the same run.
"""

from __future__ import annotations

import statistics
import time

REFERENCE_S = 0.086
"""CPU time of the sum below on the machine for which absolute goals are meant, best of 7."""
SUMMED = range(2_000_000)
BEST_OF = 7


class Yardstick:
    """Looked at now, and again whenever :meth:`look` is called: a machine with other work changes
    its speed during a run."""

    def __init__(self) -> None:
        self._looks: list[float] = []
        self.look()

    def look(self) -> None:
        """Takes about a second of CPU time."""
        self._looks.append(min(_sum_s() for _ in range(BEST_OF)))

    @property
    def cpu_s(self) -> float:
        """Of the sum, the median of all looks."""
        return statistics.median(self._looks)

    @property
    def scale(self) -> float:
        """A CPU time measured here, times this, is that of the reference machine."""
        return REFERENCE_S / self.cpu_s

    def figures(self) -> dict[str, float | list[float]]:
        """For a report."""
        return {"sum_cpu_s": self.cpu_s, "scale": self.scale, "looks_cpu_s": self._looks}


def _sum_s() -> float:
    begun_s = time.thread_time()
    sum(i * i for i in SUMMED)
    return time.thread_time() - begun_s
