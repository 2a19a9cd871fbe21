"""Numbers that only grow, from one gateway to the next, on whatever host it runs."""

from __future__ import annotations

import time
from collections.abc import Callable

from common.ids import Incarnation


class ClusterClock:
    """Milliseconds, at first those of this host's clock; never less than what anybody in the
    cluster has had, so that a clock that is behind is of no consequence."""

    def __init__(
        self,
        wall_s: Callable[[], float] = time.time,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monotonic_s = monotonic_s
        self._ahead_ms = int((wall_s() - monotonic_s()) * 1000)
        self.last = 0
        """The greatest number that was given or noted."""

    def note(self, seen: int) -> None:
        """Somebody has this number: all later ones are greater."""
        self.last = max(self.last, seen)
        self._ahead_ms = max(self._ahead_ms, seen - self._own_ms())

    def next(self) -> Incarnation:
        """Greater than all that were given, and all that were noted."""
        self.last = max(self.last + 1, self.now())
        return Incarnation(self.last)

    def now(self) -> int:
        """What time it is, as far as is known here."""
        return self._own_ms() + self._ahead_ms

    def _own_ms(self) -> int:
        return int(self._monotonic_s() * 1000)
