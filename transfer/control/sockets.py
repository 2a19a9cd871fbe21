"""Sockets of control connections: bounded, encrypted, and between ends that know each other."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

import zmq
import zmq.asyncio
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from common.process_settings import RUN_FOLDER
from transfer.control.keys import Keys
from transfer.control.senders import NOBODY

Sent = TypeVar("Sent")
"""What sending gives: nothing, or a future."""
Socket = TypeVar("Socket", zmq.Socket[bytes], zmq.asyncio.Socket)

MESSAGE_BYTES_MAX = 16 << 20
"""Of one frame, in either direction: a plan of 400,000 blocks, four of the largest announcements.
Who sends more is disconnected."""
UNIX = "run://"
"""Begins the endpoint of a unix socket in the cluster's run folder, whose path is not known before
its supervisor starts: ``run://p0``."""
HANDSHAKE_MS = 5000
"""A connection that is not up by then is tried again."""
_DOMAIN = "dualpath"


class Doorkeeper(ThreadAuthenticator):
    """Lets the holders of some keys into the servers of one context; the ``User-Id`` of a message
    is then the name of whoever has sent it (:func:`sender_of`)."""

    def __init__(self, context: zmq.Context[Socket], keys: Keys, clients: Iterable[str]) -> None:
        super().__init__(context)
        self._keys = keys
        self._names: dict[bytes, str] = {}
        self.let_in(clients)
        self.configure_curve_callback(_DOMAIN, self)
        self.start()

    def let_in(self, clients: Iterable[str]) -> None:
        """These from now on, and nobody else; whoever is connected stays. Any thread."""
        known = {name: key for key, name in self._names.items()}
        self._names = {known.get(name) or self._keys.public(name): name for name in clients}

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a key (Z85) is one of theirs."""
        return key in self._names

    def curve_user_id(self, client_public_key: bytes) -> str:
        return self._names.get(z85.encode(client_public_key), NOBODY)

    def _send_zap_reply(
        self, request_id: bytes, status_code: bytes, status_text: bytes, user_id: str = NOBODY
    ) -> None:
        """A refusal for now (300): who is to be let in later tries again after ``HANDSHAKE_MS``,
        which zmq does not after one for good (400)."""
        refused = b"300" if status_code == b"400" else status_code
        super()._send_zap_reply(request_id, refused, status_text, user_id)


def bind(socket: zmq.Socket[Sent], endpoint: str, keys: Keys, queue_max: int) -> None:
    """Serve there whom a :class:`Doorkeeper` of the socket's context lets in; without one, nobody.
    Raises ``zmq.ZMQError``."""
    _limit(socket, queue_max)
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.private)
    socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN.encode())
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    socket.bind(located(endpoint))


def connect(
    socket: zmq.Socket[Sent], endpoint: str, keys: Keys, server: str, queue_max: int
) -> None:
    """Be a client of the process ``server``, and of none that listens in its place."""
    _limit(socket, queue_max)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.public(server))
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public(keys.name))
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.private)
    socket.connect(located(endpoint))


def located(endpoint: str, run_folder: str = "") -> str:
    """As zmq takes it. ``run_folder``: of the cluster; that of this process, if it is empty."""
    if not endpoint.startswith(UNIX):
        return endpoint
    folder = run_folder or os.environ.get(RUN_FOLDER, "")
    return f"ipc://{folder}/{endpoint.removeprefix(UNIX)}"


def sender_of(frame: zmq.Frame) -> str:
    """Name of the client that has sent a frame."""
    return str(frame.get("User-Id"))


def _limit(socket: zmq.Socket[Sent], queue_max: int) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, queue_max)
    socket.setsockopt(zmq.RCVHWM, queue_max)
    socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
