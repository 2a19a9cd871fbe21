"""Tells engines which agents there are, and agents which engines, until each says it has heard."""

from __future__ import annotations

import logging
import time

from common.cluster.membership import EXPIRY_S
from common.messages.from_gateway import KnownAgents, KnownEngines
from launch.gateway.peers.membership import Membership
from launch.gateway.peers.peer import AgentPeer, EnginePeer
from launch.gateway.standby.leadership import Leadership

log = logging.getLogger(__name__)


class KnownMembers:
    """One numbered list for all, told by the active gateway alone. The number is compared for
    equality alone: it begins at a time, so that another gateway's is not taken for this one's."""

    def __init__(self, members: Membership, leadership: Leadership) -> None:
        self._members = members
        self._leadership = leadership
        self._number = int(time.time() * 1000)
        self._complete_at_s = time.monotonic() + EXPIRY_S
        self.is_complete = False
        """Who has been there before this gateway has had the time to renew its lease."""

    def begin(self) -> None:
        """This gateway is the active one from now on."""
        self._complete_at_s = time.monotonic() + EXPIRY_S
        self.changed()

    def changed(self) -> None:
        """Somebody has come or gone."""
        if not self._leadership.is_active:
            return
        self._number += 1
        for peer in self._members.peers():
            self._tell(peer)

    def heard(self, peer: AgentPeer | EnginePeer, number: int) -> None:
        """A peer says which list it heeds: it gets the newest one, unless that is it."""
        if not self._leadership.is_active:
            return
        if not self.is_complete and time.monotonic() >= self._complete_at_s:
            self.is_complete = True
            self.changed()
        elif number != self._number:
            self._tell(peer)
        else:
            peer.obeys_us = True

    def refused(self, peer: AgentPeer | EnginePeer, term: int) -> None:
        """A peer obeys a gateway of a later term. Either that has taken over; or this one is the
        later one, with a clock behind the other's: then it has never been obeyed there."""
        if not self._leadership.is_active or term <= self._leadership.term:
            return
        if peer.obeys_us:
            log.error("superseded by another gateway term=%d peer=%s", term, peer.name)
            self._leadership.step_down()
        else:
            self._leadership.begin(term)
            self.changed()

    def _tell(self, peer: AgentPeer | EnginePeer) -> None:
        number, complete, term = self._number, self.is_complete, self._leadership.term
        hosts = self._members.hosts()
        if isinstance(peer, EnginePeer):
            endpoints = {name: agent.endpoint for name, agent in self._members.agents.items()}
            peer.try_send(KnownAgents(number, endpoints, complete, term, hosts))
        else:
            engines = list(self._members.engines)
            peer.try_send(KnownEngines(number, engines, complete, term, hosts))
