"""When a standby takes over, decided on whatever clock it is told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from common.cluster.membership import EXPIRY_S
from launch.gateway.standby.copy import Copy
from launch.gateway.standby.leadership import Standing

ASK_S = 0.5
TAKEOVER_S = 2.0
"""Since the first question that the active gateway has not answered. Not since its last answer: a
standby that was suspended itself would find that long ago."""


class Peers(NamedTuple):
    """Agents and engines, in numbers."""

    known: int
    heard: int
    """Lately."""
    led: int
    """Those of them that have heard of the active gateway lately."""


class Watch:
    """What one gateway hears from the others, question for question."""

    def __init__(self, session: str, now: float) -> None:
        self._session = session
        self._silent_since: float | None = now
        """None: the active one has answered the last question."""
        self.asked_s = -math.inf
        """When a node has asked for what an active gateway gives: it has not reached one."""
        self.term = 0
        """Of the gateway that is, or was last, followed."""

    def heard(self, answers: Sequence[Copy], asked_s: float) -> Copy | None:
        """What the others have answered to a question of ``asked_s``, those that did; returns what
        to follow of it."""
        active = [answer for answer in answers if answer.standing is Standing.ACTIVE]
        if not active:
            if self._silent_since is None:
                self._silent_since = asked_s
            return None
        leader = max(active, key=_claim)
        self._silent_since = None
        self.term = leader.term
        return leader

    def is_silent(self) -> bool:
        """No active gateway has answered the last question."""
        return self._silent_since is not None

    def is_due(self, answers: Sequence[Copy], now: float, peers: Peers) -> bool:
        """Whether to take over: nobody else is active, as far as this gateway and those that it
        hears can tell, and of all standbys that answer this one is to do it, that is the one that
        has followed the latest term."""
        if self._silent_since is None or now - self._silent_since < TAKEOVER_S:
            return False
        if peers.known and not self._is_vacant(peers, now):
            return False
        standbys = [answer for answer in answers if answer.standing is Standing.STANDBY]
        own = (self.term, self._session)
        return all((other.term, other.session) < own for other in standbys)

    def _is_vacant(self, peers: Peers, now: float) -> bool:
        """Whether those that are served miss the active gateway as well: the fault may be in the
        way from here to it. One that hears nobody is cut off itself, unless nodes come to it."""
        is_reached = peers.heard > 0 or now - self.asked_s < EXPIRY_S
        return is_reached and 2 * peers.led <= peers.heard


def outranks(other: Copy, term: int, has_nodes: bool) -> bool:
    """Whether of two active gateways the other one is to stay, this one being of ``term``: one that
    nobody has joined yields to one that serves."""
    return other.standing is Standing.ACTIVE and _claim(other) > (has_nodes, term)


def _claim(copy: Copy) -> tuple[bool, int]:
    return bool(copy.nodes), copy.term
