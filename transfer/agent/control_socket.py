"""The agent's end of its control connections: one ROUTER socket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import cast

import zmq
import zmq.asyncio

from common.messages.codec import Message, encode
from transfer.control.keys import Keys
from transfer.control.sockets import Doorkeeper, bind, sender_of
from transfer.traffic.classes import CONTROL_DSCP

log = logging.getLogger(__name__)

QUEUE_MAX = 4096
"""Messages queued for, or from, one client."""


class CannotBind(Exception):
    """The control endpoint is taken or is not one of this host."""

    def __init__(self, endpoint: str, reason: str) -> None:
        super().__init__(f"cannot serve at {endpoint}: {reason}")
        self.endpoint = endpoint


class ControlSocket:
    """Never waits for a client: what its full queue does not take is dropped."""

    def __init__(self, endpoint: str, keys: Keys, clients: Iterable[str]) -> None:
        self._context = zmq.asyncio.Context()
        self._doorkeeper = Doorkeeper(self._context, keys, clients)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # Gateway and engines wait for these: they are not to queue behind the agent's KV.
        self._socket.setsockopt(zmq.TOS, CONTROL_DSCP << 2)
        try:
            bind(self._socket, endpoint, keys, QUEUE_MAX)
        except zmq.ZMQError as error:
            self.close()
            raise CannotBind(endpoint, str(error)) from error
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        """With the port that the kernel chose, if it was asked to."""

    def let_in(self, clients: Iterable[str]) -> None:
        """These clients, and no others, from now on."""
        self._doorkeeper.let_in(clients)

    async def receive(self) -> tuple[bytes, str, bytes]:
        """The next frame: the identity of its connection, the name of its sender, what it holds."""
        identity, *frames = await self._socket.recv_multipart(copy=False)
        last = frames[-1] if frames else identity
        return identity.bytes, sender_of(last), last.bytes

    def send(self, identity: bytes, message: Message) -> bool:
        """Queue a message for a client; False if it has no connection (any more)."""
        # With NOBLOCK, pyzmq settles the future before it returns it.
        sent = cast(
            "asyncio.Future[None]",
            self._socket.send_multipart([identity, encode(message)], zmq.NOBLOCK),
        )
        error = sent.exception()
        if isinstance(error, zmq.Again):
            log.warning("client's queue full, dropped message=%s", type(message).__name__)
        return error is None or isinstance(error, zmq.Again)

    def close(self) -> None:
        self._doorkeeper.stop()
        self._context.destroy(0)
