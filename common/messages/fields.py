"""What messages are made of: what the type of a field excludes does not decode, so whoever handles
a message can count on it."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from common.block import KEY_BYTES, TENANT_CHARS, BlockKey
from common.ids import Incarnation, JobId, PlanId

INT64_MAX = (1 << 63) - 1
Number = Annotated[int, Meta(ge=0, lt=1 << 48)]
Plan = Annotated[PlanId, Meta(ge=0, lt=1 << 48)]
Job = Annotated[JobId, Meta(ge=0, lt=1 << 48)]
Started = Annotated[Incarnation, Meta(ge=0, lt=1 << 48)]
Address = Annotated[int, Meta(ge=0, le=INT64_MAX)]
"""In a process's memory; msgpack carries it, numpy and Mooncake take it as an int64."""
Count = Annotated[int, Meta(ge=0, lt=1 << 31)]
Key = Annotated[BlockKey, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Witness = Annotated[bytes, Meta(max_length=1 << 20)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Tenant = Annotated[str, Meta(pattern=f"^([0-9a-f]{{{TENANT_CHARS}}})?$")]
Host = Annotated[str, Meta(pattern="^[0-9a-fA-F.:]{2,45}$")]
"""An address of IPv4 or IPv6."""
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Bytes = Annotated[int, Meta(ge=0, le=INT64_MAX)]
Port = Annotated[int, Meta(ge=0, lt=1 << 16)]

RANKS_MAX = 4096
"""Of one engine."""
REQUESTS_MAX = FENCE_JOBS_MAX = 4096
"""That an engine names with its last words; that one fence is for, others have the next."""


class MessageStruct(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of every message."""


class Ping(MessageStruct):
    """Is the process alive? Sent each second by every client to each server."""

    term: Number = 0
    """Of the gateway that plans (:mod:`common.cluster.leader`); 0 of standbys and of all others."""


class Superseded(MessageStruct):
    """The answer of an agent or an engine to a gateway that says it is active, or sends a plan: a
    gateway of a later term has taken over."""

    term: Number
