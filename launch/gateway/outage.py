"""While a role has no engine, requests wait for one to come back: each a bounded time."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Iterator

from launch.gateway.errors import Unavailable
from launch.gateway.request.cancel_scope import CancelScope

RETRY_AFTER_MIN_S = 5
RETRY_AFTER_MAX_S = 60


class Outage:
    """Begins when a request finds no engine, is over when one is found.

    Requests keep their turns: the one whose turn it is looks for an engine, those behind it wait
    no longer than it may, as all of them count from the outage's begin or their own.
    """

    def __init__(
        self,
        wait_s: float,
        wait_change: Callable[[], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``wait_change`` returns when an engine may be back, and every now and then."""
        self._wait_s = wait_s
        self._wait_change = wait_change
        self._clock = clock
        self._since_s: float | None = None
        self._lasted_s = 0.0
        self._joined_s: dict[CancelScope, float] = {}

    @property
    def waiting(self) -> int:
        """Requests that an engine would let go on."""
        return len(self._joined_s) if self._since_s is not None else 0

    @contextlib.contextmanager
    def bounded(self, scope: CancelScope) -> Iterator[None]:
        """A block that needs an engine, or the turn to look for one."""
        self._joined_s[scope] = self._clock()
        try:
            yield
        finally:
            del self._joined_s[scope]

    async def wait(self, reason: str) -> None:
        """There is no engine: return when there may be one. Scopes that have waited for
        ``wait_s`` end with ``Unavailable``."""
        now = self._clock()
        if self._since_s is None:
            self._since_s = now
        for scope, joined_s in list(self._joined_s.items()):
            waited_s = now - max(joined_s, self._since_s)
            if waited_s >= self._wait_s:
                message = f"{reason}; none came back within {self._wait_s:g} s"
                scope.cancel(Unavailable(message, self._retry_after_s(now)))
        await self._wait_change()

    def over(self) -> None:
        """There is an engine."""
        if self._since_s is not None:
            self._lasted_s = self._clock() - self._since_s
            self._since_s = None

    def _retry_after_s(self, now: float) -> int:
        """When this one will have lasted as long as the last one did."""
        assert self._since_s is not None
        left_s = math.ceil(self._since_s + self._lasted_s - now)
        return min(RETRY_AFTER_MAX_S, max(RETRY_AFTER_MIN_S, left_s))
