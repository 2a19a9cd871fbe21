"""The answer on its way to a client: a head, then chunks, in a bounded queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec

from launch.gateway.errors import ClientStalled, GatewayError

CHUNKS_MAX = 64
"""Chunks that wait for a slow client; then the engine's stream is read no further."""


class Head(msgspec.Struct, frozen=True):
    """How an answer begins."""

    status: int
    content_type: str


class Answer:
    """Of one part of a request: written by its walk, read by whoever talks to the client.

    ``stall_s``: a client that takes no chunk for so long, while all places are taken, has stalled.
    """

    def __init__(self, stream: bool, stall_s: float, named_events: bool = False) -> None:
        self.head: asyncio.Future[Head] = asyncio.get_running_loop().create_future()
        """Set with D's first byte, or to a ``GatewayError``."""
        self.aborted = False
        """The client asked the engines to end it: their abort is the answer."""
        self.first_token_s = 0.0
        """When (monotonic) it was there: with D's first byte, or P's answer if not streamed."""
        self._stream = stream
        self._named_events = named_events
        self._stall_s = stall_s
        self._places = asyncio.Semaphore(CHUNKS_MAX)
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
        """At most ``CHUNKS_MAX``, and the end."""

    @property
    def opened(self) -> bool:
        return self.head.done()

    def open(self, status: int, content_type: str) -> None:
        self.head.set_result(Head(status, content_type))

    async def write(self, chunk: bytes) -> None:
        """Raises ``ClientStalled``."""
        if self._places.locked():
            try:
                async with asyncio.timeout(self._stall_s):
                    await self._places.acquire()
            except TimeoutError as error:
                raise ClientStalled(f"nothing was read for {self._stall_s:g} s") from error
        else:
            await self._places.acquire()  # at once
        self._chunks.put_nowait(chunk)

    def close(self, error: GatewayError | None = None) -> None:
        """End the answer; an error after the first byte is its last event. Waits for nobody."""
        if error is not None and not self.opened:
            self.head.set_exception(error)
            self.head.exception()  # counts as seen, should the client be gone
        elif error is not None and self._stream:
            self._chunks.put_nowait(error.event(self._named_events))
        self._chunks.put_nowait(None)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body, after ``head``."""
        while (chunk := await self._chunks.get()) is not None:
            self._places.release()
            yield chunk
