"""What the gateway says to agents and engines."""

from __future__ import annotations

from common.experiment import NO_EXPERIMENT, Experiment
from common.ids import TraceParent
from common.messages.fields import (
    Bytes,
    Count,
    Digest,
    Host,
    Key,
    MessageStruct,
    Name,
    Number,
    Plan,
    Seconds,
)

# ---- to an agent ------------------------------------------------------------------------


class Subscribe(MessageStruct):
    """Send me every announcement from now on, beginning with a snapshot."""


class ReadShare(MessageStruct):
    """Have these blocks in DRAM, and keep them there until the plan is released."""

    plan: Plan
    keys: list[Key]
    deadline_s: float
    experiment: Experiment = NO_EXPERIMENT
    traceparent: TraceParent = ""
    sizes: list[Bytes] = []
    """Of each key the bytes, where some are objects of parts; empty: all are blocks."""


class ReleasePlan(MessageStruct):
    """Nobody needs the plan's blocks any more (sent by gateway or decode engine)."""

    plan: Plan


class KnownEngines(MessageStruct):
    """The engines that may register with the agent."""

    number: Number
    """Of this list: :attr:`AgentStatus.heard` once it is heeded."""
    names: list[Name]
    complete: bool
    """As of :class:`KnownAgents`."""
    term: Number = 0
    """Of the gateway that says so."""
    hosts: list[Host] = []
    """As of :class:`KnownAgents`."""


class ForgetWeights(MessageStruct):
    """No engine has weights of this name any more, and no other will: the gateway had made it up.
    What agents hold of their KV is to make way."""

    version: Name
    shared: bool
    """Also in the remote tier, which is all agents': one of them is told so."""
    term: Number = 0
    """As of :class:`KnownEngines`."""


# ---- to an engine -----------------------------------------------------------------------


class EnginePlan(MessageStruct):
    """The hit prefix of a request that is about to arrive as ``rid``: block i of the prompt
    is ``keys[i]`` and is in the DRAM of agent ``agents[reader[i]]``."""

    id: Plan
    rid: Name
    namespace_digest: Digest
    """Of the weights and the layout that both engines must have."""
    keys: list[Key]
    agents: list[str]
    reader: list[Count]
    deadline_s: Seconds
    experiment: Experiment = NO_EXPERIMENT
    part_readers: list[list[Count]] = []
    """Of each part of the namespace, in its order, who has in DRAM the objects of the last
    blocks of the hit (as many as :meth:`common.block.Part.needed` says), oldest first; empty of
    a plain model."""
    no_store: bool = False
    """The decode engine is to keep nothing of the request."""

    @property
    def fault(self) -> str:
        """Why nobody can act on the plan; empty if one can."""
        if len(self.reader) != len(self.keys):
            return f"{len(self.reader)} readers for {len(self.keys)} blocks"
        last = max(max(each, default=-1) for each in (self.reader, *self.part_readers))
        if last >= len(self.agents):
            return f"reader {last} of {len(self.agents)} agents"
        if any(len(readers) > len(self.keys) for readers in self.part_readers):
            return f"more readers of a part than the {len(self.keys)} blocks"
        return ""

    def reader_of(self, block: int) -> str:
        """The agent that delivers a block."""
        return self.agents[self.reader[block]]


class EndPlan(MessageStruct):
    """The request is over or was cancelled: forget the plan."""

    plan: Plan
    rid: Name


class CommitWeights(MessageStruct):
    """The engine's weights, as they are since its :attr:`WeightsState.number` became this one, are
    those that all engines call ``name``."""

    number: Count
    name: Name
    is_doubtful: bool
    """Some engine holds KV of older weights: what any of them computes may come of it."""
    term: Number = 0
    """As of :class:`KnownEngines`."""


class KnownAgents(MessageStruct):
    """The agents that the engine is to be linked to."""

    number: Number
    """Of this list: :attr:`EngineHello.heard` once it is heeded."""
    endpoints: dict[Name, Name]
    """Name -> control endpoint."""
    complete: bool
    """Whoever is missing has left. False of a gateway that has just begun: nodes may not have told
    it yet that they are there."""
    term: Number = 0
    """As of :class:`KnownEngines`."""
    hosts: list[Host] = []
    """Addresses of all members, engines and agents: ports of KV movement are to hear them."""
