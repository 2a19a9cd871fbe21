"""Every message that crosses a process boundary, and its one codec.

Servers (agents and engines) bind a zmq ROUTER; their clients connect with a
DEALER. A frame is ``PROTOCOL`` followed by one msgpack-encoded struct. Whatever
does not decode is counted and dropped by the receiver: nothing here can run code.

Numbers that name things are never reused: a *plan* is numbered by the gateway, a
*job* by the engine that issues it (both 48 bits). Agents and engines carry an
*incarnation*, the start time of their process in ms: a greater one replaces all
that came before it.
"""

from __future__ import annotations

import msgspec

from common.block import NO_PARENT, BlockKey, Namespace, TierName
from common.experiment import NO_EXPERIMENT, Experiment
from common.ids import BoardSlot, Incarnation, JobId, PlanId
from common.loads import AgentLoad, EngineLoad
from common.samples import Sample

PROTOCOL = b"DP2"


class MalformedMessage(Exception):
    """A frame of another protocol version, or one that does not decode."""


class _Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    pass


# ---- any client -> any server, and back -----------------------------------------------


class Ping(_Message):
    """Is the process alive? Sent each second by every client."""


class AgentHello(_Message):
    """An agent's answer to ``Ping``, ``Subscribe`` and ``RegisterEngine``."""

    agent: str
    incarnation: Incarnation
    session_id: str
    """Mooncake session ("host:port") of this incarnation."""
    credit_address: int = 0
    """Of the words in its memory with the credits of the engine that is greeted: its first
    rank's, then those of the others."""


# ---- gateway -> agent -------------------------------------------------------------------


class Subscribe(_Message):
    """Send me every announcement from now on, beginning with a snapshot."""


class ReadShare(_Message):
    """Have these blocks in DRAM, and keep them there until the plan is released."""

    plan: PlanId
    keys: list[BlockKey]
    deadline_s: float
    experiment: Experiment = NO_EXPERIMENT


class ReleasePlan(_Message):
    """Nobody needs the plan's blocks any more (sent by gateway or decode engine)."""

    plan: PlanId


# ---- agent -> gateway -------------------------------------------------------------------


class Holding(_Message):
    """A block came to or left a tier of the announcing agent; SSD and remote gain it when it is
    durable there."""

    key: BlockKey
    tier: TierName
    held: bool


class Announcement(_Message):
    """Holdings of an agent. ``sequence`` counts from 0 (a snapshot); a gap means resync."""

    incarnation: Incarnation
    sequence: int
    snapshot: bool
    changes: list[Holding]


class ShareRead(_Message):
    """A reader's whole share is settled: which blocks are in DRAM, and what was read for it."""

    plan: PlanId
    in_dram: list[bool]
    read_bytes: dict[TierName, int]
    queue_s: float
    """Waited for DRAM slots."""
    read_s: float


class Delivered(_Message):
    """A delivery for a plan has completed: for the request's trace."""

    plan: PlanId
    engine: str
    sent_bytes: int
    seconds: float
    """From the message to the last layer's completion."""


class AgentStatus(_Message):
    """Pushed each 0.2 s while anything changes, each second otherwise."""

    load: AgentLoad
    samples: list[Sample]


# ---- engine -> agent --------------------------------------------------------------------


class RankMemory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The memory of one rank of an engine. ``kv_addresses[layer][component]`` is the base
    address of a buffer with one shard's part of each page: page p begins at
    ``base + p * layout.component_bytes[component] / shards``."""

    session_id: str
    """Mooncake session ("host:port")."""
    kv_addresses: list[list[int]]
    board_address: int
    """Of the rank's completion board."""


class RegisterEngine(_Message):
    """Where an engine's KV lives. All of its ranks use the same page numbers and the same
    board slots; its first rank speaks for all."""

    engine: str
    incarnation: Incarnation
    namespace: Namespace
    shards: int
    """Equal parts into which the ranks split the KV heads. Rank r holds shard
    ``r * shards // len(ranks)``: with fewer shards than ranks (MLA has one) some hold alike."""
    ranks: list[RankMemory]


class Deliver(_Message):
    """Write blocks ``keys[i]`` into the sender's pages ``pages[i]``, layer by layer.

    After each layer's batch for a rank has completed, the agent writes
    ``board_word(job, layers)`` (:mod:`common.board_word`) into slot ``board_slot`` of the rank's
    completion board; on failure ``board_word(job, FAILED)``. ``JobEnded`` follows when no byte
    of this job can land any more, at any rank.
    """

    job: JobId
    plan: PlanId
    keys: list[BlockKey]
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

    job: JobId


class PullBlocks(_Message):
    """Read the sender's pages ``pages[i]`` into DRAM and keep them as blocks ``keys[i]``.

    The blocks follow each other in one prefix, the first of them ``parent``; ``tenant`` is
    :func:`common.block.tenant_digest` of the request's salt, or empty.
    """

    job: JobId
    keys: list[BlockKey]
    pages: list[int]
    deadline_s: float
    parent: BlockKey = NO_PARENT
    tenant: str = ""


# ---- agent -> engine --------------------------------------------------------------------


class JobEnded(_Message):
    """No transfer of this ``Deliver`` is in flight any more."""

    incarnation: Incarnation
    job: JobId
    error: str
    """Empty on success."""


class PullEnded(_Message):
    """No transfer of this ``PullBlocks`` is in flight; ``held[i]``: the agent holds block i."""

    incarnation: Incarnation
    job: JobId
    held: list[bool]


class UnknownEngine(_Message):
    """The agent restarted and does not know the sender: register again and resend nothing."""

    incarnation: Incarnation
    job: JobId


# ---- gateway -> engine ------------------------------------------------------------------


class EnginePlan(_Message):
    """The hit prefix of a request that is about to arrive as ``rid``: block i of the prompt
    is ``keys[i]`` and is in the DRAM of agent ``agents[reader[i]]``."""

    id: PlanId
    rid: str
    namespace_digest: bytes
    """Of the weights and the layout that both engines must have."""
    keys: list[BlockKey]
    agents: list[str]
    reader: list[int]
    deadline_s: float

    def reader_of(self, block: int) -> str:
        """The agent that delivers a block."""
        return self.agents[self.reader[block]]


class EndPlan(_Message):
    """The request is over or was cancelled: forget the plan."""

    plan: PlanId
    rid: str


# ---- engine -> gateway ------------------------------------------------------------------


class EngineHello(_Message):
    """An engine's answer to ``Ping``."""

    load: EngineLoad
    namespace: Namespace
    bootstrap_port: int
    """Prefill engines: SGLang's bootstrap server; 0 otherwise."""
    samples: list[Sample]


class PlanAccepted(_Message):
    """The plan is in place: the request may be sent."""

    plan: PlanId


class PlanRefused(_Message):
    """The engine is of another namespace by now: its ``EngineHello`` has just been sent."""

    plan: PlanId


Message = (
    Ping
    | AgentHello
    | Subscribe
    | ReadShare
    | ReleasePlan
    | Announcement
    | ShareRead
    | Delivered
    | AgentStatus
    | RegisterEngine
    | Deliver
    | CancelJob
    | PullBlocks
    | JobEnded
    | PullEnded
    | UnknownEngine
    | EnginePlan
    | EndPlan
    | EngineHello
    | PlanAccepted
    | PlanRefused
)

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
