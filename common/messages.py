"""Every message that crosses a process boundary, and its one codec.

Servers (agents and engines) bind a zmq ROUTER; their clients connect with a DEALER. A frame is
``PROTOCOL`` followed by one msgpack-encoded struct. Whatever does not decode is counted and dropped
by the receiver: nothing here can run code.

Numbers that name things are never reused: the gateway numbers a *plan*, an engine the *job*
that it issues (both 48 bits). Agents and engines carry an *incarnation*, the start time of their
process in ms: a greater one replaces all that came before it.

What the type of a field excludes does not decode, so whoever handles a message can count on it.
Who may send which message: :mod:`transfer.control.senders`.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from common.block import KEY_BYTES, NO_PARENT, TENANT_CHARS, BlockKey, Namespace, TierName
from common.cluster.known import KnownAgents, KnownEngines
from common.experiment import NO_EXPERIMENT, Experiment
from common.ids import BoardSlot, Incarnation, JobId, PlanId, TraceParent
from common.loads import AgentLoad, EngineLoad, ModelBounds
from common.samples import Sample

PROTOCOL = b"DP4"

INT64_MAX = (1 << 63) - 1
Number = Meta(ge=0, lt=1 << 48)
Plan = Annotated[PlanId, Number]
Job = Annotated[JobId, Number]
Started = Annotated[Incarnation, Number]
Address = Annotated[int, Meta(ge=0, le=INT64_MAX)]
"""In a process's memory; msgpack carries it, numpy and Mooncake take it as an int64."""
Count = Annotated[int, Meta(ge=0, lt=1 << 31)]
Key = Annotated[BlockKey, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Witness = Annotated[bytes, Meta(max_length=1 << 20)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Tenant = Annotated[str, Meta(pattern=f"^([0-9a-f]{{{TENANT_CHARS}}})?$")]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Bytes = Annotated[int, Meta(ge=0, le=INT64_MAX)]
Port = Annotated[int, Meta(ge=0, lt=1 << 16)]

RANKS_MAX = 4096
"""Of one engine."""
REQUESTS_MAX = FENCE_JOBS_MAX = 4096
"""That an engine names with its last words; that one fence is for, others have the next."""


class MalformedMessage(Exception):
    """A frame of another protocol version, or one that does not decode."""


class _Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    pass


# ---- any client -> any server, and back -----------------------------------------------


class Ping(_Message):
    """Is the process alive? Sent each second by every client."""


class AgentHello(_Message):
    """An agent's answer to ``Ping``, ``Subscribe`` and ``RegisterEngine``."""

    agent: Name
    incarnation: Started
    session_id: Name
    """Mooncake session ("host:port") of this incarnation."""
    credit_address: Address = 0
    """Of words in its memory: credits of the engine that is greeted, its first rank's first."""


# ---- gateway -> agent -------------------------------------------------------------------


class Subscribe(_Message):
    """Send me every announcement from now on, beginning with a snapshot."""


class ReadShare(_Message):
    """Have these blocks in DRAM, and keep them there until the plan is released."""

    plan: Plan
    keys: list[Key]
    deadline_s: float
    experiment: Experiment = NO_EXPERIMENT
    traceparent: TraceParent = ""


class ReleasePlan(_Message):
    """Nobody needs the plan's blocks any more (sent by gateway or decode engine)."""

    plan: Plan


# ---- agent -> gateway -------------------------------------------------------------------


class Holding(_Message):
    """A block came to or left a tier of the announcing agent; SSD and remote gain it when it is
    durable there."""

    key: Key
    tier: TierName
    held: bool


class Announcement(_Message):
    """Holdings of an agent. ``sequence`` counts from 0 (a snapshot); a gap means resync."""

    incarnation: Started
    sequence: Annotated[int, Number]
    snapshot: bool
    changes: list[Holding]


class ShareRead(_Message):
    """A reader's whole share is settled: which blocks are in DRAM, and what was read for it."""

    plan: Plan
    in_dram: list[bool]
    read_bytes: dict[TierName, int]
    queue_s: Seconds
    """Waited for DRAM slots."""
    read_s: Seconds


class Delivered(_Message):
    """A delivery for a plan has completed: for the request's trace."""

    plan: Plan
    engine: Name
    sent_bytes: Bytes
    seconds: Seconds
    """From the message to the last layer's completion."""


class AgentStatus(_Message):
    """Pushed each 0.2 s while anything changes, each second otherwise."""

    load: AgentLoad
    samples: list[Sample]
    heard: Annotated[int, Number] = 0
    """Number of the last ``KnownEngines``."""


# ---- engine -> agent --------------------------------------------------------------------


class RankMemory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The memory of one rank of an engine. ``kv_addresses[layer][component]`` is the base
    address of a buffer with one shard's part of each page: page p begins at
    ``base + p * layout.component_bytes[component] / shards``."""

    session_id: Name
    """Mooncake session ("host:port")."""
    kv_addresses: list[list[Address]]
    board_address: Address
    """Of the rank's completion board."""
    data_port: Port = 0
    """Where its Mooncake takes TCP connections; 0: it takes none."""


class RegisterEngine(_Message):
    """Where an engine's KV lives. All of its ranks use the same page numbers and the same
    board slots; its first rank speaks for all."""

    engine: Name
    incarnation: Started
    namespace: Namespace
    shards: Annotated[int, Meta(ge=1, le=RANKS_MAX)]
    """Equal parts into which the ranks split the KV heads. Rank r holds shard
    ``r * shards // len(ranks)``: with fewer shards than ranks (MLA has one) some hold alike."""
    ranks: Annotated[list[RankMemory], Meta(min_length=1, max_length=RANKS_MAX)]
    pages: Count
    """Of each rank's KV pool: a job names lower numbers."""
    board_slots: Count
    """Words of each rank's completion board, likewise."""


class Deliver(_Message):
    """Write blocks ``keys[i]`` into the sender's pages ``pages[i]``, layer by layer.

    After each layer's batch for a rank has completed, the agent writes
    ``board_word(job, layers)`` (:mod:`common.board_word`) into slot ``board_slot`` of the rank's
    completion board; on failure ``board_word(job, FAILED)``. ``JobEnded`` follows when the agent
    begins nothing more for this job, at any rank. What the engine has not registered (a page, a
    slot of its boards) fails the job alone.
    """

    job: Job
    plan: Plan
    keys: list[Key]
    pages: list[int]
    board_slot: BoardSlot
    urgent: bool
    """True for a prefill engine, whose forward waits; False for a decode engine."""
    deadline_s: float
    first_position: int = -1
    """Of layer 0 in the sender's layer window: layer l is written when the sender's credits
    allow position ``first_position + l``. -1: there is no window."""


class CancelJob(_Message):
    """Stop at the next batch; ``JobEnded`` follows."""

    job: Job


class PullBlocks(_Message):
    """Read the sender's pages ``pages[i]`` into DRAM and keep them as blocks ``keys[i]``.

    The blocks follow each other in one prefix, the first of them ``parent``; ``tenant`` is
    :func:`common.block.tenant_digest` of the request's salt, or empty.
    """

    job: Job
    keys: list[Key]
    pages: list[int]
    deadline_s: float
    parent: Key = NO_PARENT
    tenant: Tenant = ""


class KeepWitness(_Message):
    """The sender's KV of the witness prompt under a namespace (:mod:`engine.witness`). An agent
    that knows of none keeps it, if it ``may_keep``; ``KeptWitness`` follows."""

    namespace_digest: Digest
    values: Witness
    may_keep: bool


class AskFence(_Message):
    """``Fenced`` follows, once nothing that has failed with the sender is under way any more. These
    jobs are never begun from now on; one that runs is cancelled, and not answered: ask again."""

    number: Count
    jobs: Annotated[list[Job], Meta(max_length=FENCE_JOBS_MAX)]


# ---- agent -> engine --------------------------------------------------------------------


class KeptWitness(_Message):
    """What the agent and the stores that it uses keep of a namespace: usually one witness, none
    where that could not be found out."""

    namespace_digest: Digest
    kept: Annotated[list[Witness], Meta(max_length=16)]


class JobEnded(_Message):
    """Nothing more is begun for this ``Deliver``."""

    incarnation: Started
    job: Job
    error: str
    """Empty on success."""
    may_land: bool = False
    """A write of it has failed, and its bytes may still be on their way."""


class Fenced(_Message):
    """Bytes of what had failed can come from a kernel alone: over connections from one of
    ``hosts`` (the agent's) with no process's end, (address, port), there: not a ``live`` one."""

    number: Count
    hosts: list[Name]
    live: list[tuple[Name, Port]]


class PullEnded(_Message):
    """No transfer of this ``PullBlocks`` is in flight; ``held[i]``: the agent holds block i."""

    incarnation: Started
    job: Job
    held: list[bool]


class UnknownEngine(_Message):
    """The agent restarted and does not know the sender: register again and resend nothing."""

    incarnation: Started
    job: Job


# ---- gateway -> engine ------------------------------------------------------------------


class EnginePlan(_Message):
    """The hit prefix of a request that is about to arrive as ``rid``: block i of the prompt
    is ``keys[i]`` and is in the DRAM of agent ``agents[reader[i]]``."""

    id: Plan
    rid: Name
    namespace_digest: Digest
    """Of the weights and the layout that both engines must have."""
    keys: list[Key]
    agents: list[str]
    reader: list[Annotated[int, Meta(ge=0, lt=1 << 31)]]
    deadline_s: Seconds
    experiment: Experiment = NO_EXPERIMENT

    @property
    def fault(self) -> str:
        """Why nobody can act on the plan; empty if one can."""
        if len(self.reader) != len(self.keys):
            return f"{len(self.reader)} readers for {len(self.keys)} blocks"
        if self.reader and max(self.reader) >= len(self.agents):
            return f"reader {max(self.reader)} of {len(self.agents)} agents"
        return ""

    def reader_of(self, block: int) -> str:
        """The agent that delivers a block."""
        return self.agents[self.reader[block]]


class EndPlan(_Message):
    """The request is over or was cancelled: forget the plan."""

    plan: Plan
    rid: Name


# ---- engine -> gateway ------------------------------------------------------------------


class EngineHello(_Message):
    """An engine's answer to ``Ping``."""

    load: EngineLoad
    namespace: Namespace
    bootstrap_port: int
    """Prefill engines: SGLang's bootstrap server; 0 otherwise."""
    bounds: ModelBounds
    samples: list[Sample]
    heard: Annotated[int, Number] = 0
    """Number of the last ``KnownAgents``."""


class EngineEnds(_Message):
    """The last words of an engine that has failed: its scheduler raised an error."""

    incarnation: Started
    rids: Annotated[list[Name], Meta(max_length=REQUESTS_MAX)]
    """What it was at work on; empty if that is not known."""
    reason: str


class PlanAccepted(_Message):
    """The plan is in place: the request may be sent."""

    plan: Plan


class PlanRefused(_Message):
    """Nobody could carry the plan out; ``stale``: here, as the engine is of another namespace by
    now (its ``EngineHello`` has just been sent)."""

    plan: Plan
    reason: str
    stale: bool = False


_OfAgents = AgentHello | Announcement | ShareRead | Delivered | AgentStatus | UnknownEngine
_OfJobs = Deliver | CancelJob | PullBlocks | AskFence | JobEnded | Fenced | PullEnded
_OfGateway = Subscribe | ReadShare | ReleasePlan | EnginePlan | EndPlan | KnownAgents | KnownEngines
_OfEngines = RegisterEngine | EngineHello | EngineEnds | PlanAccepted | PlanRefused
_OfWitness = KeepWitness | KeptWitness
Message = Ping | _OfAgents | _OfJobs | _OfGateway | _OfEngines | _OfWitness

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """One frame."""
    return PROTOCOL + _encoder.encode(message)


def decode(frame: bytes) -> Message:
    """The struct in a frame; raises :class:`MalformedMessage`."""
    if frame[: len(PROTOCOL)] != PROTOCOL:
        raise MalformedMessage(f"expected protocol {PROTOCOL!r}, got {frame[:3]!r}")
    try:
        return _decoder.decode(memoryview(frame)[len(PROTOCOL) :])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise MalformedMessage(str(error)) from error
