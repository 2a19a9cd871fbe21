"""Whom the gateway knows: told to engines and agents at each change, until they say that they have
heard it."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Number = Annotated[int, Meta(ge=0, lt=1 << 48)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]


class KnownAgents(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """To an engine: the agents that it is to be linked to."""

    number: Number
    """Of this list: :attr:`EngineHello.heard` once it is heeded."""
    endpoints: dict[Name, Name]
    """Name -> control endpoint."""
    complete: bool
    """Whoever is missing has left. False of a gateway that has just begun: nodes may not have told
    it yet that they are there."""


class KnownEngines(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """To an agent: the engines that may register with it."""

    number: Number
    """Of this list: :attr:`AgentStatus.heard` once it is heeded."""
    names: list[Name]
    complete: bool
    """As of :class:`KnownAgents`."""
