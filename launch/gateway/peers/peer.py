"""One control connection: its socket, its liveness, and what the process last said.

Every send is non-blocking and the queue is bounded: a peer whose queue is full, or that
has no connection, counts as unreachable.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import cast

import zmq
import zmq.asyncio

from common.cluster.membership import EngineAddress
from common.ids import Incarnation
from common.messages.codec import MalformedMessage, Message, decode, encode
from common.messages.from_agents import AgentStatus
from common.messages.from_engines import EngineHello
from common.messages.from_gateway import Subscribe
from common.samples import Sample
from transfer.control.keys import Keys
from transfer.control.sockets import connect

log = logging.getLogger(__name__)

RESYNC_S = 5.0
"""A snapshot that has not come by then is asked for again."""
QUEUE_MAX = 1000
"""Messages queued for, or from, one peer."""


class PeerUnreachable(Exception):
    """The message could not even be queued."""


class Peer:
    """One agent or engine, seen from here."""

    kind = "peer"

    def __init__(self, name: str, endpoint: str, context: zmq.asyncio.Context, keys: Keys) -> None:
        self.name = name
        self.endpoint = endpoint
        self.incarnation = Incarnation(-1)
        self.last_seen_s = -math.inf
        self.malformed_total = 0
        self.obeys_us = False
        """It has heeded this gateway as the active one, at least once."""
        self.watchers: set[Callable[[str], None]] = set()
        """Called with a reason when the peer dies or restarts."""
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        connect(self._socket, endpoint, keys, name, QUEUE_MAX)

    def send(self, message: Message) -> None:
        """Queue a message; raises :class:`PeerUnreachable`."""
        if self._socket.closed:
            raise PeerUnreachable(f"{self.name} has left the cluster")
        # With DONTWAIT, pyzmq settles the future before it returns it.
        sent = cast("asyncio.Future[None]", self._socket.send(encode(message), zmq.DONTWAIT))
        if (error := sent.exception()) is not None:
            raise PeerUnreachable(f"{self.name}: {error}")

    def try_send(self, message: Message) -> None:
        """Queue a message that its receiver can do without (it has a deadline of its own)."""
        try:
            self.send(message)
        except PeerUnreachable as error:
            log.debug("not sent message=%s peer=%s", type(message).__name__, error)

    async def receive(self) -> Message:
        """The next message that decodes."""
        while True:
            frames = await self._socket.recv_multipart()
            try:
                return decode(frames[-1])
            except MalformedMessage as error:
                self.malformed_total += 1
                log.warning("malformed message dropped peer=%s error=%s", self.name, error)

    def renew(self, incarnation: Incarnation) -> bool:
        """Note an incarnation; True if the process is another than before."""
        if incarnation <= self.incarnation:
            return False
        if self.incarnation >= 0:
            self.notify("restarted")
        self.incarnation = incarnation
        return True

    def notify(self, reason: str) -> None:
        for watcher in list(self.watchers):
            watcher(f"{self.name} {reason}")

    def close(self) -> None:
        self._socket.close(0)


class AgentPeer(Peer):
    """An agent, and how far its holdings are known."""

    kind = "agent"
    status: AgentStatus | None = None
    snapshot_asked_s = -math.inf
    synced = False

    def samples(self) -> list[Sample]:
        return self.status.samples if self.status is not None else []

    @property
    def led_in(self) -> int:
        """Term of the active gateway, as far as it has heard of one lately; else 0."""
        return self.status.led_in if self.status is not None else 0

    def resync(self, now: float) -> None:
        """Ask for a snapshot, unless one is on its way."""
        self.synced = False
        if now - self.snapshot_asked_s >= RESYNC_S:
            self.snapshot_asked_s = now
            self.try_send(Subscribe())


class EnginePeer(Peer):
    """An engine: alive only when both its scheduler and its HTTP process answer."""

    kind = "engine"

    def __init__(self, address: EngineAddress, context: zmq.asyncio.Context, keys: Keys) -> None:
        super().__init__(address.name, address.control, context, keys)
        self.address = address
        self.hello: EngineHello | None = None
        self.http_alive = False
        self.lost = True
        """It has not reported since it was lost."""
        self.ended: Incarnation | None = None
        """The one that has said its last words."""

    def samples(self) -> list[Sample]:
        return self.hello.samples if self.hello is not None else []

    @property
    def led_in(self) -> int:
        """As of an agent."""
        return self.hello.led_in if self.hello is not None else 0

    def known(self) -> EngineHello:
        """Its last hello; only for engines that a plan names."""
        if self.hello is None:
            raise PeerUnreachable(f"{self.name} has never answered")
        return self.hello
