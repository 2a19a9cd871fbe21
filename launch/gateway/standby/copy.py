"""What an active gateway alone knows, as its standby has it copied twice a second.

All else a standby hears itself, from the agents and engines. JSON over HTTP, at a route for those
that have the join token.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from common.cluster.membership import Token
from launch.gateway.orders import KeptOrders
from launch.gateway.registry.node import HostsOfEngine, Node
from launch.gateway.request.suspects import KeptFingerprint
from launch.gateway.services import Services
from launch.gateway.standby.leadership import Standing

COPY = "/membership/copy"

Number = Annotated[int, Meta(ge=0, lt=1 << 48)]


class CopyRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /membership/copy``."""

    session: Token
    """Of the gateway that asks."""


class Copy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Its answer."""

    session: Token
    """Of the gateway that answers: random, made at its start."""
    standing: Standing
    term: Number
    """Its own; of a standby the one that it follows."""
    next_plan: Number = 0
    clock: Number = 0
    """Greatest incarnation that was given."""
    nodes: list[Node] = []
    hosts: dict[str, HostsOfEngine] = {}
    """By engine."""
    orders: KeptOrders = msgspec.field(default_factory=KeptOrders)
    fingerprints: list[KeptFingerprint] = []


def copied(services: Services, session: str) -> Copy:
    """What this gateway knows."""
    leadership, registry = services.leadership, services.registry
    if not leadership.is_active:
        return Copy(session, leadership.standing, leadership.term)
    clock, hosts = registry.incarnations.copied()
    return Copy(
        session,
        leadership.standing,
        leadership.term,
        services.scheduler.next_plan,
        clock,
        list(registry.nodes.values()),
        hosts,
        services.orders.kept,
        services.suspects.fingerprints.copied(),
    )


def mirror(services: Services, copy: Copy) -> None:
    """Know the same."""
    services.registry.mirror(copy.nodes)
    services.registry.incarnations.mirror(copy.clock, copy.hosts)
    services.orders.mirror(copy.orders)
    services.suspects.fingerprints.mirror(copy.fingerprints)
