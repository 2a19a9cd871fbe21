"""The tensor-parallel ranks of an engine: one hears, all do alike.

Each rank runs a copy of SGLang's scheduler, and the copies must decide alike: a page that is
free at one rank and not yet at another would be given out there to another request. What
SGLang does follows from the requests, which its first rank broadcasts. What reaches us at a
time of its own (a plan, an agent's greeting, the end of a transfer) does not: so only the
first rank, the *leader*, talks to the gateway and the agents. What it hears becomes *events*,
which travel with SGLang's broadcast and take effect at all ranks at the same point of their
loops.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec
import torch
import torch.distributed
from torch.distributed import ProcessGroup

from common.ids import Incarnation, JobId
from common.messages.codec import Message
from common.messages.from_engines import RegisterEngine
from common.messages.from_gateway import EndPlan, EnginePlan
from engine.weights import NamespaceEvent
from transfer.connections import Connection, Endpoint

T = TypeVar("T")


class JobOver(msgspec.Struct, frozen=True):
    """No transfer of a job is in flight any more."""

    job: JobId
    reason: str
    """Empty on success."""


class CreditsAt(msgspec.Struct, frozen=True):
    """Where an agent looks for this engine's credits (:mod:`transfer.credits`)."""

    agent: str
    session_id: str
    address: int
    """Of the first rank's word; those of the others follow."""
    tag: int = 0
    """That makes a word this engine's."""


class AgentLeft(msgspec.Struct, frozen=True):
    """An agent is not one of the cluster any more."""

    agent: str


class HostsKnown(msgspec.Struct, frozen=True):
    """Every rank's ports are to hear these hosts, if they ``are_all`` no others any more."""

    hosts: list[str]
    are_all: bool


class FindConnections(msgspec.Struct, frozen=True):
    """Every rank looks, on its own host, for connections to it that are none of these."""

    agent: str
    """Whose fence it is for."""
    number: int
    hosts: list[str]
    """From which they come."""
    live: list[Endpoint]


class CutConnections(msgspec.Struct, frozen=True):
    """Every rank ends those of its TCP connections that are among these."""

    agent: str
    number: int
    late: list[dict[Connection, int]]
    """By rank: a connection, and its socket's inode."""


_OfAgents = CreditsAt | AgentLeft | FindConnections | CutConnections
Event = EnginePlan | EndPlan | JobOver | HostsKnown | NamespaceEvent | _OfAgents


class Events(msgspec.Struct, frozen=True):
    """An item among the requests that SGLang broadcasts."""

    events: list[Event]


class RankGroup:
    """This rank's place, and what the ranks agree on. ``cpu_group``: theirs; None of one rank.

    ``apply`` is called with each event, in the scheduler's thread; in an engine of one rank
    by whoever posts it, at once, but for what changes the namespace, which must not within a step.
    """

    def __init__(
        self, rank: int, size: int, cpu_group: ProcessGroup | None, apply: Callable[[Event], None]
    ) -> None:
        self.rank = rank
        self.size = size
        self._cpu_group = cpu_group
        self._apply = apply
        self._lock = threading.Lock()
        self._events: list[Event] = []

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    # ---- from the leader to all ----

    def post(self, event: Event) -> None:
        """Have an event take effect at every rank; the leader, any thread."""
        if self.size == 1 and not isinstance(event, NamespaceEvent):
            self._apply(event)
            return
        with self._lock:
            self._events.append(event)

    def take(self) -> list[Events]:
        """What is to travel with the next broadcast: an item, or none."""
        with self._lock:
            events, self._events = self._events, []
        return [Events(events)] if events else []

    def arrived(self, requests: list[object]) -> list[object]:
        """Let the events among the broadcast requests take effect; returns the others."""
        for item in requests:
            if isinstance(item, Events):
                for event in item.events:
                    self._apply(event)
        return [item for item in requests if not isinstance(item, Events)]

    # ---- all ranks at once, in the scheduler's thread ----

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        torch.distributed.all_gather_object(values, value, group=self._cpu_group)
        return values

    def of_leader(self, value: T) -> T:
        """The first rank's value, at every rank."""
        return self.gather(value)[0]

    def all_of(self, flags: list[bool]) -> list[bool]:
        """Which of the flags are set at every rank."""
        if self.size == 1 or not flags:
            return flags
        least = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(
            least, op=torch.distributed.ReduceOp.MIN, group=self._cpu_group
        )
        return [bool(flag) for flag in least.tolist()]


class Links(Protocol):
    """The engine's links to agents, or what stands for them."""

    def send(self, agent: str, message: Message) -> bool:
        """Whether the message is on its way."""

    def incarnation(self, agent: str) -> Incarnation | None:
        """The newest one seen."""

    def host(self, agent: str) -> str:
        """Where it is; empty: it is no member, or on the engine's own host."""

    def set_hello(self, hello: RegisterEngine) -> None:
        """Register anew with every agent."""


class SilentLinks:
    """Stands for the links to agents at a rank that is not the leader: it sends nothing, and
    takes every message for sent. What did not reach an agent becomes known as an event."""

    def send(self, agent: str, message: Message) -> bool:
        return True

    def incarnation(self, agent: str) -> Incarnation | None:
        return None

    def host(self, agent: str) -> str:
        return ""

    def set_hello(self, hello: RegisterEngine) -> None:
        return
