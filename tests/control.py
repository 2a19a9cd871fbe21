"""Control connections of tests: everyone's keys come of one secret."""

from __future__ import annotations

from typing import TypeVar

import zmq

from transfer.control.keys import Keys
from transfer.control.sockets import connect

SECRET = "a secret that only tests know of"
Sent = TypeVar("Sent")


def keys(name: str) -> Keys:
    return Keys(name, SECRET)


def join(socket: zmq.Socket[Sent], endpoint: str, name: str, server: str) -> None:
    """Connect as ``name``."""
    connect(socket, endpoint, keys(name), server, 1000)


def stand_in_for(socket: zmq.Socket[Sent], endpoint: str, name: str) -> None:
    """Serve there as ``name``, whoever comes."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys(name).private)
    socket.bind(endpoint)
