"""Who may come in, and whose turn it is: the bound on requests, shared fairly by tenants.

Where there are API keys, a tenant is whose key the request has, and what the request says of itself
is a user of that tenant. Without keys the tenant is what it says: the first of SGLang's
``cache_salt``, OpenAI's ``user``, the ``Authorization`` header; all else is one tenant. Then the
gateway believes what it is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from common.json import JsonObject
from launch.gateway.errors import TooManyRequests
from launch.gateway.fair_queue import Entry, FairQueue

RETRY_AFTER_MAX_S = 60
TURNS_KEPT = 64
"""The pace of the queue is that of its last turns, at most so many."""


class Client(msgspec.Struct, frozen=True):
    """Who a request is from, as far as the queue and an abort are concerned."""

    tenant: str
    """Shares are its."""
    user: str = ""
    """Of the tenant, who shares alike among them."""
    owner: str = ""
    """Who may abort it; "" for anybody."""

    @classmethod
    def of(cls, body: JsonObject, key_tenant: str, authorization: str | None) -> Client:
        """``key_tenant``: that of the request's API key, which says who is who where there are
        keys; empty without them."""
        if not key_tenant:
            return cls(tenant_of(body, authorization), owner=tenant_of({}, authorization))
        tenant = f"key:{key_tenant}"
        return cls(tenant, tenant_of(body, None), owner=tenant)


def tenant_of(body: JsonObject, authorization: str | None) -> str:
    """A short digest (salts and keys are secrets); "" for a request that names nobody."""
    salt, user = body.get("cache_salt"), body.get("user")
    if isinstance(salt, list):  # one for each prompt: the request is admitted as a whole
        salt = next((one for one in salt if one), None)
    for kind, value in (("salt", salt), ("user", user), ("key", authorization)):
        if isinstance(value, str) and value:
            named = f"{kind}:{value}".encode(errors="surrogatepass")
            return hashlib.blake2b(named, digest_size=8).hexdigest()
    return ""


@dataclass(eq=False)
class Seat:
    """A client's request, from its admission to its end; each of its parts counts."""

    tenant: str
    parts: int
    """Not ended yet."""
    owner: str = ""
    """Who may abort it."""
    user: str = ""
    begun: bool = False
    """One of the parts has had its turn: the request is never displaced."""
    waiting: set[Entry[Waiter]] = field(default_factory=set)

    @property
    def displaceable(self) -> bool:
        """All of it still queues."""
        return not self.begun and len(self.waiting) == self.parts > 0


@dataclass(eq=False)
class Waiter:
    """One part in the queue. ``ready`` is set with its turn, or to ``TooManyRequests``."""

    seat: Seat
    ready: asyncio.Future[None]


class Admission:
    """At most ``parts_max`` parts of requests at a time; one of them has the turn.

    When all are taken, a request still comes in at the expense of a tenant that holds more:
    that tenant's last queued request is turned away instead. A request is never displaced by a
    tenant that would then hold more than the displaced one, nor once it has had its turn.
    """

    def __init__(self, parts_max: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._parts_max = parts_max
        self._clock = clock
        self._held: Counter[str] = Counter()
        self._queue: FairQueue[Waiter] = FairQueue()
        self._taken = False
        self._turns_s: deque[float] = deque(maxlen=TURNS_KEPT)
        """When the queue formed, and when its last turns ended."""
        self.admitted = 0
        """Parts that are in."""
        self.displaced_total = 0
        """Requests that were admitted and then turned away."""

    @property
    def queued(self) -> int:
        """Parts that wait for their turn, or have it."""
        return len(self._queue) + self._taken

    @property
    def tenants_queued(self) -> int:
        return self._queue.tenants

    def retry_after_s(self) -> int:
        """When to come again: half of the queue will have had its turn, at the pace of its
        last turns. There is room by then, and work still waits."""
        if not self.queued:  # a place is free as soon as any request ends
            return 1
        turns = max(1, len(self._turns_s) - 1)
        turn_s = (self._clock() - self._turns_s[0]) / turns
        return min(RETRY_AFTER_MAX_S, max(1, math.ceil(turn_s * self.queued / 2)))

    # ---- the bound --------------------------------------------------------------------

    def admit(self, tenant: str, parts: int, owner: str = "", user: str = "") -> Seat:
        """Room for a request; raises ``TooManyRequests``. :meth:`leave` once for each part."""
        for seat in self._in_the_way(tenant, parts):
            self._displace(seat)
        self._held[tenant] += parts
        self.admitted += parts
        return Seat(tenant, parts, owner, user)

    def leave(self, seat: Seat) -> None:
        """A part has ended, however."""
        self._give_back(seat, min(1, seat.parts))  # none are left of a displaced request

    def _give_back(self, seat: Seat, parts: int) -> None:
        seat.parts -= parts
        self.admitted -= parts
        self._held[seat.tenant] -= parts
        if not self._held[seat.tenant]:
            del self._held[seat.tenant]

    def _in_the_way(self, tenant: str, parts: int) -> list[Seat]:
        """Requests whose end makes room for ``parts`` of ``tenant``; usually none."""
        missing = self.admitted + parts - self._parts_max
        if missing <= 0:
            return []
        held = Counter(self._held)
        least = held[tenant] + parts
        for seat in self._displaceable(held, least):
            if seat.parts >= missing:
                return [seat]
        seats: list[Seat] = []
        while missing > 0:
            others = (seat for seat in self._displaceable(held, least) if seat not in seats)
            if (found := next(others, None)) is None:
                raise TooManyRequests(
                    f"{self.admitted} requests are in flight; at most {self._parts_max}",
                    self.retry_after_s(),
                )
            seats.append(found)
            held[found.tenant] -= found.parts
            missing -= found.parts
        return seats

    def _displaceable(self, held: Counter[str], least: int) -> Iterator[Seat]:
        """Requests of tenants that keep ``least`` parts without them: the heaviest tenant
        first, and of each what would go last."""
        for tenant, parts in held.most_common():
            if parts <= least:
                return
            for entry in self._queue.last_first(tenant):
                seat = entry.item.seat
                if seat.displaceable and parts - seat.parts >= least:
                    yield seat

    def _displace(self, seat: Seat) -> None:
        self.displaced_total += 1
        for entry in seat.waiting:
            self._queue.remove(entry)
            if not entry.item.ready.done():
                reason = "the queue is full, and this tenant holds most of it"
                entry.item.ready.set_exception(TooManyRequests(reason, self.retry_after_s()))
        seat.waiting.clear()
        self._give_back(seat, seat.parts)

    # ---- the turn ---------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def turn(self, seat: Seat, cost_tokens: int, priority: int) -> AsyncIterator[None]:
        """Wait for the turn (see ``FairQueue``) and have it; raises ``TooManyRequests``."""
        waiter = Waiter(seat, asyncio.get_running_loop().create_future())
        if not self.queued:
            self._turns_s.clear()
            self._turns_s.append(self._clock())
        entry = self._queue.push(seat.tenant, cost_tokens, priority, waiter, seat.user)
        seat.waiting.add(entry)
        self._next_turn()
        try:
            await waiter.ready
            yield
        finally:
            if _granted(waiter.ready):
                self._taken = False
                self._turns_s.append(self._clock())
                self._next_turn()
            else:
                self._queue.remove(entry)
                seat.waiting.discard(entry)

    def _next_turn(self) -> None:
        while not self._taken and (entry := self._queue.pop()) is not None:
            waiter = entry.item
            waiter.seat.waiting.discard(entry)
            if not waiter.ready.done():  # else it was cancelled this very moment
                self._taken = waiter.seat.begun = True
                waiter.ready.set_result(None)


def _granted(ready: asyncio.Future[None]) -> bool:
    return ready.done() and not ready.cancelled() and ready.exception() is None
