"""Nodes that came and went, and those that were not taken in."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from enum import Enum

from common.cluster.membership import Role
from launch.gateway.errors import Conflict
from launch.gateway.registry.node import Node


class Change(Enum):
    """What happened to a node."""

    JOINED = "joined"
    EXPIRED = "expired"
    """Its lease ran out."""
    LEFT = "left"
    FORGOTTEN = "forgotten"
    """It was silent for too long, or an operator wanted it no more."""


class NodeCounts:
    """Of this gateway, since its start."""

    def __init__(self) -> None:
        self.changes: Counter[tuple[Role, Change]] = Counter()
        self.refusals: Counter[Conflict.Reason] = Counter()

    def changed(self, node: Node, change: Change) -> None:
        self.changes[node.role, change] += 1

    @contextlib.contextmanager
    def refusal(self) -> Iterator[None]:
        """Count a :class:`Conflict` that is raised within."""
        try:
            yield
        except Conflict as error:
            self.refusals[error.reason] += 1
            raise
