"""What an agent says to the gateway and to engines."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from common.block import TierName
from common.loads import AgentLoad
from common.messages.fields import (
    Address,
    Bytes,
    Count,
    Digest,
    Job,
    Key,
    MessageStruct,
    Name,
    Number,
    Plan,
    Port,
    Seconds,
    Started,
    Witness,
)
from common.samples import Sample


class AgentHello(MessageStruct):
    """An agent's answer to ``Ping``, ``Subscribe`` and ``RegisterEngine``."""

    agent: Name
    incarnation: Started
    session_id: Name
    """Mooncake session ("host:port") of this incarnation."""
    credit_address: Address = 0
    """Of words in its memory: credits of the engine that is greeted, its first rank's first."""


# ---- to the gateway ---------------------------------------------------------------------


class Holding(MessageStruct):
    """A block came to or left a tier of the announcing agent; SSD and remote gain it when it is
    durable there."""

    key: Key
    tier: TierName
    held: bool


class Announcement(MessageStruct):
    """Holdings of an agent. ``sequence`` counts from 0 (a snapshot); a gap means resync."""

    incarnation: Started
    sequence: Number
    snapshot: bool
    changes: list[Holding]


class ShareRead(MessageStruct):
    """A reader's whole share is settled: which blocks are in DRAM, and what was read for it."""

    plan: Plan
    in_dram: list[bool]
    read_bytes: dict[TierName, int]
    queue_s: Seconds
    """Waited for DRAM slots."""
    read_s: Seconds


class Delivered(MessageStruct):
    """A delivery for a plan has completed: for the request's trace."""

    plan: Plan
    engine: Name
    sent_bytes: Bytes
    seconds: Seconds
    """From the message to the last layer's completion."""


class AgentStatus(MessageStruct):
    """Pushed each 0.2 s while anything changes, each second otherwise."""

    load: AgentLoad
    samples: list[Sample]
    heard: Number = 0
    """Number of the last ``KnownEngines``."""
    led_in: Number = 0
    """Term of the active gateway, which it has heard of lately; 0: of none."""


# ---- to an engine -----------------------------------------------------------------------


class KeptWitness(MessageStruct):
    """What the agent and the stores that it uses keep of a namespace: usually one witness, none
    where that could not be found out."""

    namespace_digest: Digest
    kept: Annotated[list[Witness], Meta(max_length=16)]


class JobEnded(MessageStruct):
    """Nothing more is begun for this ``Deliver``."""

    incarnation: Started
    job: Job
    error: str
    """Empty on success."""
    may_land: bool = False
    """A write of it has failed, and its bytes may still be on their way."""


class Fenced(MessageStruct):
    """Bytes of what had failed can come from a kernel alone: over connections from one of
    ``hosts`` (the agent's) with no process's end, (address, port), there: not a ``live`` one."""

    number: Count
    hosts: list[Name]
    live: list[tuple[Name, Port]]


class PullEnded(MessageStruct):
    """No transfer of this ``PullBlocks`` is in flight; ``held[i]``: the agent holds block i.
    After the blocks come the objects of each part that it has named, in its order."""

    incarnation: Started
    job: Job
    held: list[bool]


class UnknownEngine(MessageStruct):
    """The agent restarted and does not know the sender: register again and resend nothing."""

    incarnation: Started
    job: Job
