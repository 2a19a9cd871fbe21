"""A frame is ``PROTOCOL`` followed by one msgpack-encoded struct. Whatever does not decode is
counted and dropped by the receiver: nothing here can run code."""

from __future__ import annotations

import msgspec

from common.messages.fields import Ping, Superseded
from common.messages.from_agents import (
    AgentHello,
    AgentStatus,
    Announcement,
    Delivered,
    Fenced,
    JobEnded,
    KeptWitness,
    PullEnded,
    ShareRead,
    UnknownEngine,
)
from common.messages.from_engines import (
    AskFence,
    CancelJob,
    Deliver,
    EngineEnds,
    EngineHello,
    KeepWitness,
    PlanAccepted,
    PlanRefused,
    PullBlocks,
    RegisterEngine,
)
from common.messages.from_gateway import (
    CommitWeights,
    EndPlan,
    EnginePlan,
    ForgetWeights,
    KnownAgents,
    KnownEngines,
    ReadShare,
    ReleasePlan,
    Subscribe,
)

PROTOCOL = b"DP6"

_OfGateway = Subscribe | ReadShare | ReleasePlan | KnownEngines | ForgetWeights
_OfGatewayToEngines = EnginePlan | EndPlan | KnownAgents | CommitWeights
_OfAgents = AgentHello | Announcement | ShareRead | Delivered | AgentStatus
_OfAgentsJobs = JobEnded | PullEnded | Fenced | UnknownEngine | KeptWitness
_OfEngines = RegisterEngine | EngineHello | EngineEnds | PlanAccepted | PlanRefused
_OfEnginesJobs = Deliver | CancelJob | PullBlocks | AskFence | KeepWitness
_OfAll = Ping | Superseded
Message = (
    _OfAll
    | _OfGateway
    | _OfGatewayToEngines
    | _OfAgents
    | _OfAgentsJobs
    | _OfEngines
    | _OfEnginesJobs
)


class MalformedMessage(Exception):
    """A frame of another protocol version, or one that does not decode."""


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
