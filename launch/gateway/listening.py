"""The socket that clients connect to."""

from __future__ import annotations

import socket

import uvicorn


def listen(config: uvicorn.Config, stall_s: float) -> socket.socket:
    """Bound, for ``uvicorn.Server``, which itself would wait for ever: the kernel ends a connection
    whose client acknowledges, or has room for, nothing that was sent for twice ``stall_s``. By
    then the request has been ended, and counted (``Answer.write``).
    """
    listening = config.bind_socket()
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(2000 * stall_s))
    return listening  # connections inherit it
