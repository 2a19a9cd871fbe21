"""How many requests are in flight, whose turn is next, and how full the cluster was kept."""

from __future__ import annotations

import asyncio
import time
from collections import deque

import msgspec

BINS_MAX = 64


class Slots:
    """At most ``limit`` requests in flight. Begun episodes go before new ones."""

    def __init__(self, limit: int, samples: int) -> None:
        self.limit = limit
        self.held = 0
        self.left = samples
        """Samples that have not ended."""
        self.thinking = 0
        """Of them, those whose environment is to say something."""
        self.use = Use(limit)
        self._begun: deque[asyncio.Future[None]] = deque()
        self._new: deque[asyncio.Future[None]] = deque()

    async def take(self, begun: bool) -> None:
        """Wait for a slot."""
        if self.held < self.limit and not self._begun and (begun or not self._new):
            self.held += 1
            return
        turn = asyncio.get_running_loop().create_future()
        queue = self._begun if begun else self._new
        queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back()
            else:
                queue.remove(turn)
            raise

    def give_back(self) -> None:
        while self._begun or self._new:
            turn = (self._begun or self._new).popleft()
            if not turn.done():  # the slot goes from hand to hand
                turn.set_result(None)
                return
        self.held -= 1

    def changed(self) -> None:
        """``left`` or ``thinking`` has changed."""
        self.use.could_be(min(self.limit, self.left - self.thinking))


class Utilisation(msgspec.Struct, frozen=True):
    """``full_share`` of the time as many were in flight as could be; ``mean_share`` of the limit
    was in flight; ``in_flight`` is a course of means, ``step_s`` apart."""

    full_share: float
    mean_share: float
    step_s: float
    in_flight: list[float]


class Use:
    """Requests in flight over time."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._begun_s = self._at_s = time.monotonic()
        self._in_flight = self._possible = 0
        self._in_flight_s = self._full_s = 0.0
        self._bin_s = 0.05
        self._bins = [0.0]

    def are(self, in_flight: int) -> None:
        """So many requests are in flight from now on."""
        self._account()
        self._in_flight = in_flight

    def could_be(self, possible: int) -> None:
        """So many could be in flight from now on."""
        self._account()
        self._possible = possible

    def _account(self) -> None:
        now = time.monotonic()
        self._in_flight_s += self._in_flight * (now - self._at_s)
        if self._in_flight >= self._possible:
            self._full_s += now - self._at_s
        self._spread(self._at_s - self._begun_s, now - self._begun_s)
        self._at_s = now

    def _spread(self, begin_s: float, end_s: float) -> None:
        while end_s > self._bin_s * BINS_MAX:
            pairs = zip(self._bins[::2], [*self._bins[1::2], 0.0], strict=False)
            self._bins = [a + b for a, b in pairs]
            self._bin_s *= 2
        first, last = int(begin_s / self._bin_s), int(end_s / self._bin_s)
        self._bins += [0.0] * (last + 1 - len(self._bins))
        for index in range(first, last + 1):
            part_begin_s = max(begin_s, index * self._bin_s)
            part_end_s = min(end_s, (index + 1) * self._bin_s)
            self._bins[index] += self._in_flight * max(0.0, part_end_s - part_begin_s)

    def summary(self) -> Utilisation:
        """Until now."""
        self._account()
        seconds = max(self._at_s - self._begun_s, 1e-9)
        steps_s = [self._bin_s] * (len(self._bins) - 1)
        steps_s.append(max(seconds - sum(steps_s), 1e-9))
        return Utilisation(
            full_share=round(self._full_s / seconds, 4),
            mean_share=round(self._in_flight_s / seconds / self._limit, 4),
            step_s=self._bin_s,
            in_flight=[round(v / step_s, 2) for v, step_s in zip(self._bins, steps_s, strict=True)],
        )
