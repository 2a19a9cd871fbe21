"""Which of a cluster's gateways plans: the one of the greatest term."""

from __future__ import annotations

import time
from asyncio import Event
from collections.abc import Callable
from enum import Enum

from common.ids import PlanId
from scheduler.scheduler import Scheduler

PLANS_PER_MS = 128
"""A term begins at a plan number that no earlier one reaches, made of the time, so that a restarted
gateway repeats none (48 bits last until the year 2039)."""
PLANS_AHEAD = 1 << 20
"""More than another gateway can have made since it was heard."""


class Standing(Enum):
    """What a gateway is in its cluster."""

    STANDBY = "standby"
    """Knows everything, plans nothing."""
    ACTIVE = "active"
    SUPERSEDED = "superseded"
    """Another one is active, of a later term: this one ends."""


class Leadership:
    """This gateway's standing, and its term.

    A term is the number of the first plan in it: whoever gets a plan knows whether its gateway is
    the present one, and no two gateways give one number. The scheduler goes on from there.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        is_active: bool = True,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._scheduler = scheduler
        self._wall_s = wall_s
        self.standing = Standing.STANDBY
        self.term = PlanId(0)
        self.takeovers_total = 0
        """From a gateway that this one has been the standby of."""
        self.began = Event()
        """Set while active."""
        self.ended = Event()
        """Set once superseded."""
        if is_active:
            self.begin(0)

    @property
    def is_active(self) -> bool:
        return self.standing is Standing.ACTIVE

    def begin(self, above: int) -> None:
        """Plan from now on. ``above``: every number that another gateway is known to have given,
        its term included; 0: there was none. Also when active, by a clock that turned out to be
        behind another's: in a later term then."""
        next_plan = int(self._wall_s() * 1000) * PLANS_PER_MS
        if above:
            next_plan = max(next_plan, above + PLANS_AHEAD)
        self.term = PlanId(max(next_plan, self._scheduler.next_plan))
        self._scheduler.next_plan = self.term
        self.standing = Standing.ACTIVE
        self.began.set()

    def step_down(self) -> None:
        """Another gateway is active: plan nothing any more."""
        self.standing = Standing.SUPERSEDED
        self.began.clear()
        self.ended.set()
