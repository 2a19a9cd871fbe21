"""What an engine says to agents and to the gateway."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from common.block import NO_PARENT, Namespace
from common.ids import BoardSlot
from common.loads import EngineLoad, ModelBounds
from common.messages.fields import (
    FENCE_JOBS_MAX,
    RANKS_MAX,
    REQUESTS_MAX,
    Address,
    Count,
    Digest,
    Job,
    Key,
    MessageStruct,
    Name,
    Number,
    Plan,
    Port,
    Started,
    Tenant,
    Witness,
)
from common.samples import Sample

# ---- to an agent ------------------------------------------------------------------------


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
    part_addresses: list[list[list[Address]]] = []
    """``[part][layer][component]``, likewise, of each part of the namespace; 0 where the layer
    has none. Place p begins at ``base + p * component_bytes[component] / shards``."""


class RegisterEngine(MessageStruct):
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
    part_places: list[Count] = []
    """Of each part of the namespace: how many places each rank's pool has."""


class PartPlaces(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Objects of one part: that of *block* ``keys[i]`` (:func:`common.block.part_key` makes its
    own key) is at ``places[i]`` of the part's pool: a page of the windows' pool, a slot of the
    states'."""

    keys: list[Key]
    places: list[int]


class Deliver(MessageStruct):
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
    parts: list[PartPlaces] = []
    """Of each part of the namespace, in its order, the objects to write as well: layer l's are in
    layer l's batch. Empty: of none."""


class CancelJob(MessageStruct):
    """Stop at the next batch; ``JobEnded`` follows."""

    job: Job


class PullBlocks(MessageStruct):
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
    parts: list[PartPlaces] = []
    """Objects to keep as well, as of :class:`Deliver`; not only of the blocks in ``keys``."""
    replaces: list[Key] = []
    """Blocks earlier in the same prefix: theirs go first, once these objects of parts are held."""
    is_branch: bool = False
    """Prompts part here: these objects have been used by one more than they seem to be."""


class KeepWitness(MessageStruct):
    """The sender's KV of the witness prompt under a namespace (:mod:`engine.witness`). An agent
    that knows of none keeps it, if it ``may_keep``; ``KeptWitness`` follows."""

    namespace_digest: Digest
    values: Witness
    may_keep: bool


class AskFence(MessageStruct):
    """``Fenced`` follows, once nothing that has failed with the sender is under way any more. These
    jobs are never begun from now on; one that runs is cancelled, and not answered: ask again."""

    number: Count
    jobs: Annotated[list[Job], Meta(max_length=FENCE_JOBS_MAX)]


# ---- to the gateway ---------------------------------------------------------------------


class WeightsState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is known of an engine's weights (:mod:`engine.weights`)."""

    number: Count = 0
    """Greater each time that any of this, or the namespace for its sake, has changed."""
    changes: Count = 0
    """How often weights were written since the engine began."""
    named_at_change: Count = 0
    """``changes`` when they last had a name."""
    last_name: str = ""
    """The weight version of the namespace then."""
    version: str = ""
    """As the trainer calls them."""
    is_named: bool = True
    """Their namespace may be other engines', too."""
    is_doubtful: bool = False
    """The engine holds KV of older weights: a name is for what is computed until it is flushed."""
    is_digesting: bool = False
    """They are from a folder, whose digest is awaited."""
    is_broken: bool = False
    """An update has failed in its midst: nobody knows them."""
    in_session: bool = False
    """They may be written at any time (``begin_weight_update``)."""


class EngineHello(MessageStruct):
    """An engine's answer to ``Ping``."""

    load: EngineLoad
    namespace: Namespace
    bootstrap_port: int
    """Prefill engines: SGLang's bootstrap server; 0 otherwise."""
    bounds: ModelBounds
    samples: list[Sample]
    heard: Number = 0
    """Number of the last ``KnownAgents``."""
    led_in: Number = 0
    """As of :class:`~common.messages.from_agents.AgentStatus`."""
    weights: WeightsState = WeightsState()


class EngineEnds(MessageStruct):
    """The last words of an engine that has failed: its scheduler raised an error."""

    incarnation: Started
    rids: Annotated[list[Name], Meta(max_length=REQUESTS_MAX)]
    """What it was at work on; empty if that is not known."""
    reason: str


class PlanAccepted(MessageStruct):
    """The plan is in place: the request may be sent."""

    plan: Plan


class PlanRefused(MessageStruct):
    """Nobody could carry the plan out; ``stale``: here, as the engine is of another namespace by
    now (its ``EngineHello`` has just been sent)."""

    plan: Plan
    reason: str
    stale: bool = False
