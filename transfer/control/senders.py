"""Who may send a server which message."""

from __future__ import annotations

from common.messages.codec import MalformedMessage, Message, decode
from common.messages.fields import Ping
from common.messages.from_engines import (
    AskFence,
    CancelJob,
    Deliver,
    KeepWitness,
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

GATEWAY, LAUNCHER = "gateway", "launcher"
"""Names of their keys; all others are engines, or agents, which are nobody's clients."""
NOBODY = "nobody"
"""Whose key was let in no more by the time it was asked for."""

_GATEWAYS = (
    Subscribe,
    ReadShare,
    ReleasePlan,
    EnginePlan,
    EndPlan,
    KnownAgents,
    KnownEngines,
    CommitWeights,
    ForgetWeights,
)
_ENGINES = (
    RegisterEngine,
    ReleasePlan,
    Deliver,
    CancelJob,
    PullBlocks,
    AskFence,
    KeepWitness,
)


def decode_from(sender: str, frame: bytes) -> Message:
    """The message in a frame, if its sender may send it: plans are the gateway's, and an engine
    speaks for itself alone. Raises :class:`MalformedMessage`."""
    message = decode(frame)
    if isinstance(message, Ping):
        return message
    allowed = {GATEWAY: _GATEWAYS, LAUNCHER: (), NOBODY: ()}.get(sender, _ENGINES)
    if not isinstance(message, allowed):
        raise MalformedMessage(f"{type(message).__name__} is not {sender}'s to send here")
    if isinstance(message, RegisterEngine) and message.engine != sender:
        raise MalformedMessage(f"{sender} cannot register as {message.engine}")
    return message
