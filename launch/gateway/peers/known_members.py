"""Tells engines which agents there are, and agents which engines, until each says it has heard."""

from __future__ import annotations

import time

from common.cluster.known import KnownAgents, KnownEngines
from common.cluster.membership import EXPIRY_S
from launch.gateway.peers.membership import Membership
from launch.gateway.peers.peer import AgentPeer, EnginePeer


class KnownMembers:
    """One numbered list for all. The number is compared for equality alone: it begins at a time, so
    that another gateway's is not taken for this one's."""

    def __init__(self, members: Membership) -> None:
        self._members = members
        self._number = int(time.time() * 1000)
        self._complete_at_s = time.monotonic() + EXPIRY_S
        self.is_complete = False
        """Who has been there before this gateway has had the time to renew its lease."""

    def changed(self) -> None:
        """Somebody has come or gone."""
        self._number += 1
        for peer in self._members.peers():
            self._tell(peer)

    def heard(self, peer: AgentPeer | EnginePeer, number: int) -> None:
        """A peer says which list it heeds: it gets the newest one, unless that is it."""
        if not self.is_complete and time.monotonic() >= self._complete_at_s:
            self.is_complete = True
            self.changed()
        elif number != self._number:
            self._tell(peer)

    def _tell(self, peer: AgentPeer | EnginePeer) -> None:
        if isinstance(peer, EnginePeer):
            endpoints = {name: agent.endpoint for name, agent in self._members.agents.items()}
            peer.try_send(KnownAgents(self._number, endpoints, self.is_complete))
        else:
            peer.try_send(KnownEngines(self._number, list(self._members.engines), self.is_complete))
