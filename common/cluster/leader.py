"""Which of a cluster's gateways an agent or an engine obeys."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

LED_S = 2.0
"""A gateway pings every second."""


class Leader:
    """The gateway of the greatest term that was heard of. A term is the number of its first plan,
    so that each plan says whose it is (:mod:`launch.gateway.standby.leadership`)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.term = 0
        self._clock = clock
        self._heard_s = -math.inf

    def heard(self, term: int) -> bool:
        """A gateway says that it is active in this term; False: another has taken over from it."""
        if term < self.term:
            return False
        self.term, self._heard_s = term, self._clock()
        return True

    def has_given(self, plan: int) -> bool:
        """Whether a plan is this gateway's, or that of one which has not said yet that it has taken
        over; not one of before."""
        return plan >= self.term

    @property
    def present_term(self) -> int:
        """0: no active gateway was heard lately."""
        return self.term if self._clock() - self._heard_s < LED_S else 0
