"""Asks processes for a sign of life."""

from __future__ import annotations

import aiohttp
import zmq
import zmq.asyncio

from common.messages.codec import encode
from common.messages.fields import Ping
from launch.cluster.process_record import HealthCheck
from transfer.control.sockets import connect, located

_TIMEOUT_S = 3.0


class Prober:
    """Runs health checks; keeps one connection to each control endpoint."""

    def __init__(self, run_folder: str) -> None:
        self._run_folder = run_folder
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S))
        self._zmq = zmq.asyncio.Context()
        self._sockets: dict[str, zmq.asyncio.Socket] = {}

    async def passes(self, check: HealthCheck) -> bool:
        """One attempt, of 3 s at most."""
        if check.kind == "http":
            return await self._http_answers(check)
        return await self._answers_ping(check)

    async def close(self) -> None:
        await self._http.close()
        self._zmq.destroy(linger=0)

    async def _http_answers(self, check: HealthCheck) -> bool:
        try:
            # Of a certificate, its name is not this address's, and nothing secret is sent.
            async with self._http.get(check.target, ssl=False) as response:
                return check.any_status or response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _answers_ping(self, check: HealthCheck) -> bool:
        socket = self._sockets.get(check.target)
        if socket is None:
            assert check.keys is not None
            socket = self._sockets[check.target] = self._zmq.socket(zmq.DEALER)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
            endpoint = located(check.target, self._run_folder)
            connect(socket, endpoint, check.keys, check.server, queue_max=1)  # no pile of pings
        try:
            while await socket.poll(0):  # answers to earlier pings say nothing about now
                await socket.recv(zmq.NOBLOCK)
            await socket.send(encode(Ping()), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return bool(await socket.poll(int(_TIMEOUT_S * 1000)))
