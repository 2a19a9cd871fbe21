"""Whose request goes next: fair queuing of tenants by prompt tokens. Pure; no clock.

Start-time fair queuing (Goyal, Vin and Cheng, SIGCOMM 1996; the virtual token counter of
Sheng et al., OSDI 2024, is a relative). Every tenant that waits has a *start*, a virtual time
in tokens. The tenant with the earliest start goes next, and its start moves on by the tokens
of its request. So tenants that wait all the time get the same number of tokens, to within
one request. Within a tenant the higher priority goes first, then its users take turns likewise: a
request's start is where its user's last one ended, at least where the tenant is.

A tenant that comes joins at the virtual time, which moves on with every request by its
tokens divided among those who wait. Virtual time so catches up with everyone's start, however
many new tenants come, and of equal starts the older tenant goes first: nobody starves. (With
the start of the last request in its place, as in the paper, an endless row of new tenants
would all go before an old one.)
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

TENANTS_REMEMBERED = 1024
"""Tenants that have nothing waiting, but may have had more than their share."""


@dataclass(eq=False)
class Entry(Generic[T]):
    """One request in the queue."""

    tenant: str
    cost_tokens: int
    priority: int
    number: int
    """Counts up with each request that comes."""
    item: T
    user: str = ""
    start: float = 0.0
    """In its tenant's tokens."""

    @property
    def end(self) -> float:
        """Where its user's next one starts."""
        return self.start + self.cost_tokens

    @property
    def rank(self) -> tuple[int, float, int]:
        """Order within its tenant."""
        return -self.priority, self.start, self.number


@dataclass
class _Line(Generic[T]):
    """What one tenant has waiting, in order."""

    start: float
    joined: int
    entries: list[Entry[T]] = field(default_factory=list)
    virtual: float = 0.0
    """Where a user comes in; it moves on with every entry."""
    user_ends: dict[str, float] = field(default_factory=dict)
    """Of users who are ahead of it: where their last entries end."""

    def add(self, entry: Entry[T]) -> None:
        entry.start = max(self.virtual, self.user_ends.get(entry.user, 0.0))
        self.user_ends[entry.user] = entry.end
        bisect.insort(self.entries, entry, key=lambda e: e.rank)

    def left(self, entry: Entry[T]) -> None:
        """It was taken out unpaid: its user is no further than its other entries."""
        ends = (other.end for other in self.entries if other.user == entry.user)
        self.user_ends[entry.user] = max(ends, default=entry.start)

    def went(self) -> None:
        """The first entry is about to be taken out."""
        moved_on = self.virtual + self.entries[0].cost_tokens / len(self.entries)
        earliest = min((entry.start for entry in self.entries[1:]), default=moved_on)
        self.virtual = max(moved_on, earliest)
        self.user_ends = {u: end for u, end in self.user_ends.items() if end > self.virtual}


class FairQueue(Generic[T]):
    """Takes entries of any tenant, gives them back in a fair order.

    Bounded by whoever admits the requests. A push is logarithmic in the tenant's entries,
    a pop linear in the tenants that wait.
    """

    def __init__(self) -> None:
        self._lines: dict[str, _Line[T]] = {}
        self._owing: OrderedDict[str, float] = OrderedDict()
        """Start of tenants that have nothing waiting."""
        self._virtual = 0.0
        self._count = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def tenants(self) -> int:
        """Tenants with something waiting."""
        return len(self._lines)

    def push(
        self, tenant: str, cost_tokens: int, priority: int, item: T, user: str = ""
    ) -> Entry[T]:
        """Queue ``item``, which takes ``cost_tokens`` (at least 1 is counted)."""
        self._count += 1
        entry = Entry(tenant, max(1, cost_tokens), priority, self._count, item, user)
        line = self._lines.get(tenant)
        if line is None:
            start = max(self._virtual, self._owing.pop(tenant, 0.0))
            line = self._lines[tenant] = _Line(start, self._count)
        line.add(entry)
        self._length += 1
        return entry

    def pop(self) -> Entry[T] | None:
        """The next entry, which is paid for; None if the queue is empty."""
        if not self._lines:
            return None
        line = min(self._lines.values(), key=lambda line: (line.start, line.joined))
        entry = line.entries[0]
        latest = max(line.start for line in self._lines.values())
        moved_on = self._virtual + entry.cost_tokens / len(self._lines)
        self._virtual = min(max(moved_on, line.start), latest)
        line.start += entry.cost_tokens
        line.went()
        self._take_out(line, entry)
        return entry

    def remove(self, entry: Entry[T]) -> bool:
        """Take an entry out unpaid; False if it is not in the queue any more."""
        line = self._lines.get(entry.tenant)
        if line is None or entry not in line.entries:
            return False
        self._take_out(line, entry)
        line.left(entry)
        return True

    def _take_out(self, line: _Line[T], entry: Entry[T]) -> None:
        line.entries.remove(entry)
        self._length -= 1
        if not line.entries:
            del self._lines[entry.tenant]
            self._owing[entry.tenant] = line.start
            if len(self._owing) > TENANTS_REMEMBERED:
                self._owing.popitem(last=False)

    def last_first(self, tenant: str) -> Iterator[Entry[T]]:
        """What a tenant has waiting, beginning with what would go last."""
        line = self._lines.get(tenant)
        return reversed(line.entries) if line is not None else iter(())
