"""A way to an HTTP server on which things go wrong: for tests and for hedged reads."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

CHUNK_BYTES = 256 << 10
STALL_S = 60.0
"""Longer than any client waits."""


class Fault(Enum):
    """What becomes of one request."""

    NONE = "none"
    ERROR_500 = "500 Internal Server Error"
    ERROR_503 = "503 Slow Down"
    RESET = "reset"
    """The connection is reset in the middle of the answer."""
    TRUNCATE = "truncate"
    """The connection ends in the middle of the answer."""
    STALL = "stall"
    """Half of the answer, then silence."""


class Verdict(NamedTuple):
    """``delay_s`` passes before anything else."""

    fault: Fault = Fault.NONE
    delay_s: float = 0.0


Judge = Callable[[str, str], Verdict]
"""Given method and path."""


class FaultyProxy:
    """Listens on ``port``; every request is judged on its own, and goes over a connection of
    its own."""

    def __init__(self, host: str, upstream_port: int, tls: ssl.SSLContext | None = None) -> None:
        self.judge: Judge = lambda method, path: Verdict()
        self.port = 0
        self._upstream = host, upstream_port
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()
        if not self._started.wait(10):
            raise TimeoutError("the proxy does not start")

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        serving = asyncio.start_server(self._serve, self._upstream[0], 0, ssl=self._tls)
        server = self._loop.run_until_complete(serving)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._pass_on(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method, path, _ = head.decode("latin-1").split(" ", 2)
        fault, delay_s = self.judge(method, path)
        await asyncio.sleep(delay_s)
        body = _length(head)
        if fault in (Fault.ERROR_500, Fault.ERROR_503):
            await _read(reader, body)
            answer = f"HTTP/1.1 {fault.value}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            writer.write(answer.encode())
            await writer.drain()
            return
        upstream_reader, upstream = await asyncio.open_connection(*self._upstream)
        try:
            upstream.write(head[:-2] + b"Connection: close\r\n\r\n")
            while body:
                part = await reader.readexactly(min(body, CHUNK_BYTES))
                upstream.write(part)
                await upstream.drain()
                body -= len(part)
            await _answer(upstream_reader, writer, fault)
        finally:
            upstream.close()


async def _answer(
    upstream: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault
) -> None:
    head = await upstream.readuntil(b"\r\n\r\n")
    writer.write(head)
    left = _length(head) // 2 if fault is not Fault.NONE else -1
    while left and (part := await upstream.read(CHUNK_BYTES if left < 0 else left)):
        writer.write(part)
        await writer.drain()
        left -= len(part) if left > 0 else 0
    if fault is Fault.STALL:
        await asyncio.sleep(STALL_S)
    elif fault is Fault.RESET:
        raw: socket.socket = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


def _length(head: bytes) -> int:
    for line in head.decode("latin-1").split("\r\n"):
        name, _, value = line.partition(":")
        if name.lower() == "content-length":
            return int(value)
    return 0


async def _read(reader: asyncio.StreamReader, nbytes: int) -> None:
    while nbytes:
        nbytes -= len(await reader.readexactly(min(nbytes, CHUNK_BYTES)))
