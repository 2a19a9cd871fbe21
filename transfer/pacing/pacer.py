"""Holds KV movement to a rate, where no network keeps it from disturbing inference.

A token bucket for what an agent sends through one NIC. Its rate is a fixed one, or what the
NIC's other traffic leaves (:class:`SpareRate`), but never less than the work that cannot wait
needs (the *floor*). Those who wait are served by their precedence.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import msgspec

from common.sizes import parse_size

BURST_S = 0.005
"""A bucket holds, and one batch of a paced transfer has, what the rate gives in this time."""
BATCH_BYTES_MIN = 64 * 1024
"""Smaller batches would cost more in calls than they give in smoothness."""
SAMPLE_S = 0.1
"""Between two looks at the NIC's counters. One batch more or less in a sample is little."""
PEAK_S = 1.0
"""Other traffic counts with its largest sample of this time: inference comes in bursts."""
HEADROOM = 0.1
"""Of the NIC's rate, kept free, so that other traffic can grow and be seen to grow."""
WIRE_BYTES_PER_BYTE = 1.05
"""Headers: what a byte of payload adds to a NIC's counter, at most (TCP, packets of 1500)."""
CHECK_S = 0.1
"""Between two looks of a waiting thread at whether its job is still wanted."""

SHARE_MIN = 0.01
"""Of the NIC's rate, that KV movement always gets: as with classes."""
IN_TIME = 0.9
"""Of the time until its deadline, in which the oldest plan is to be done."""


class Precedence(NamedTuple):
    """Of transfers: the smallest goes first."""

    is_patient: bool
    """False for a prefill engine's, whose forward waits."""
    plan: int
    arrival: int


class BadPace(ValueError):
    """No way to pace; the message says what there is."""


Pace = Literal["auto", "on", "off"] | float
"""How KV movement is held back: a rate is in bytes a second."""
_PACE_WORDS: dict[str, Pace] = {"auto": "auto", "on": "on", "off": "off"}


def read_pace(text: str) -> Pace:
    """As an operator writes it. Raises :class:`BadPace`."""
    if (word := _PACE_WORDS.get(text)) is not None:
        return word
    try:
        rate = float(parse_size(text))
    except ValueError as error:
        raise BadPace(f"pace {text!r}: give auto, on, off, or bytes a second as 200MB") from error
    if rate <= 0:
        raise BadPace(f"pace {text!r}: give a rate greater than 0, or off")
    return rate


class Cap(Protocol):
    """The rate that KV movement may have."""

    others_rate: float
    """Bytes a second that the NIC sends besides; 0 if nobody looks."""

    def rate(self, now: float, own_bytes: int) -> float:
        """Bytes a second from now on. ``own_bytes``: payload that was let go so far."""


class FixedRate:
    """The same at all times."""

    others_rate = 0.0

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s

    def rate(self, now: float, own_bytes: int) -> float:
        return self._bytes_per_s


class SpareRate:
    """What a NIC has left for KV movement: its rate less headroom, less others' peak.

    ``sent_bytes`` reads the NIC's own counter. Others get whatever they ask for: the more they
    send, the less is left, down to SHARE_MIN of the NIC.

    A pause between two calls is one long sample: it counts with its mean, until PEAK_S have
    passed.
    """

    def __init__(self, nic_bytes_per_s: float, sent_bytes: Callable[[], int]) -> None:
        self._nic_bytes_per_s = nic_bytes_per_s
        self._sent_bytes = sent_bytes
        self._last: tuple[float, int, int] | None = None
        self._samples: deque[tuple[float, float]] = deque()
        self.others_rate = 0.0

    def rate(self, now: float, own_bytes: int) -> float:
        with contextlib.suppress(OSError):  # the NIC is gone, and soon the routes over it
            if self._last is None:
                self._last = now, self._sent_bytes(), own_bytes
            elif now - self._last[0] >= SAMPLE_S:
                self._sample(now, self._sent_bytes(), own_bytes)
        spare = (1 - HEADROOM) * self._nic_bytes_per_s - self.others_rate
        return max(SHARE_MIN * self._nic_bytes_per_s, spare) / WIRE_BYTES_PER_BYTE

    def _sample(self, now: float, sent_bytes: int, own_bytes: int) -> None:
        assert self._last is not None
        then, sent_before, own_before = self._last
        self._last = now, sent_bytes, own_bytes
        others = sent_bytes - sent_before - WIRE_BYTES_PER_BYTE * (own_bytes - own_before)
        self._samples.append((now, max(0.0, others) / (now - then)))
        while self._samples[0][0] < now - PEAK_S:
            self._samples.popleft()
        self.others_rate = max(rate for _, rate in self._samples)


class TokenBucket:
    """``rate`` bytes a second, and ``BURST_S`` of it at once.

    A taker may overdraw: it begins when anything is there, and the next one waits for the
    debt. So between any two moments t apart at most rate x (t + BURST_S) and one batch go.
    """

    def __init__(self, now: float) -> None:
        self.rate = 0.0
        self._level_bytes = 0.0
        self._filled_at = now

    def set_rate(self, now: float, rate: float) -> None:
        """From now on; what has come in until now did so at the earlier rate."""
        self._fill(now)
        self.rate = rate

    def take(self, now: float, nbytes: int) -> None:
        self._fill(now)
        self._level_bytes -= nbytes

    def ready_in_s(self, now: float) -> float:
        """Until something may be taken: 0, or ``inf`` at rate 0."""
        self._fill(now)
        if self.rate <= 0:
            return float("inf")
        return max(0.0, -self._level_bytes / self.rate)

    def _fill(self, now: float) -> None:
        filled = self._level_bytes + self.rate * (now - self._filled_at)
        self._level_bytes = min(filled, max(0.0, self.rate * BURST_S))
        self._filled_at = now


class PacerStats(msgspec.Struct, frozen=True):
    """For the metrics. Rates are bytes a second."""

    rate: float
    floor_rate: float
    others_rate: float
    waiting: int
    """Transfers that wait for their turn."""
    waited_s_total: float
    bytes_total: int
    floor_hits_total: int
    """Times that the floor was above what was left, so that KV movement took more."""


Turn = tuple[Precedence, int]
"""Whose, and when it came."""


class Pacer:
    """Thread-safe. ``floor`` gives the rate below which it must not fall at a moment; it and
    ``cap`` are asked at most every SAMPLE_S."""

    def __init__(
        self,
        cap: Cap,
        floor: Callable[[float], float] = lambda now: 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cap, self.floor, self._clock = cap, floor, clock
        self._changed = threading.Condition()
        self._bucket = TokenBucket(clock())
        self._renewed_at = float("-inf")
        self._arrivals = itertools.count()
        self._waiting: list[Turn] = []
        self._floor_rate = 0.0
        self._waited_s_total = 0.0
        self._bytes_total = 0
        self._floor_hits_total = 0

    @property
    def batch_bytes(self) -> int:
        """Of a transfer's batches, so that none is a burst of its own."""
        return max(BATCH_BYTES_MIN, int(self._bucket.rate * BURST_S))

    def wait(self, precedence: Precedence, check: Callable[[], None], nbytes: int) -> None:
        """Returns when a batch of so many bytes may be sent; ``check`` may raise to give up."""
        began = self._clock()
        with self._changed:
            turn = self.join(precedence)
            try:
                check()
                while (pause_s := self.pause_s(turn)) > 0:
                    self._changed.wait(min(pause_s, CHECK_S))
                    check()
                self.spend(nbytes)
            finally:
                self._waited_s_total += self._clock() - began
                self.leave(turn)

    # ---- the steps of `wait`, under the lock ----

    def join(self, precedence: Precedence) -> Turn:
        """Begin to wait."""
        turn = precedence, next(self._arrivals)
        heapq.heappush(self._waiting, turn)
        return turn

    def pause_s(self, turn: Turn) -> float:
        """0 when this one may go; else when to ask again, if nobody leaves before."""
        now = self._clock()
        self._renew(now)
        return CHECK_S if self._waiting[0] != turn else self._bucket.ready_in_s(now)

    def spend(self, nbytes: int) -> None:
        """So many bytes go now."""
        self._bytes_total += nbytes
        self._bucket.take(self._clock(), nbytes)

    def leave(self, turn: Turn) -> None:
        """The next one may have its turn."""
        self._waiting.remove(turn)
        heapq.heapify(self._waiting)
        self._changed.notify_all()

    def _renew(self, now: float) -> None:
        if now - self._renewed_at < SAMPLE_S:
            return
        self._renewed_at = now
        cap, self._floor_rate = self._cap.rate(now, self._bytes_total), self.floor(now)
        self._floor_hits_total += cap < self._floor_rate
        self._bucket.set_rate(now, max(cap, self._floor_rate))

    # ---- what it does ----

    def stats(self) -> PacerStats:
        """As of the last time that someone waited."""
        with self._changed:
            return PacerStats(
                rate=self._bucket.rate,
                floor_rate=self._floor_rate,
                others_rate=self._cap.others_rate,
                waiting=len(self._waiting),
                waited_s_total=self._waited_s_total,
                bytes_total=self._bytes_total,
                floor_hits_total=self._floor_hits_total,
            )
