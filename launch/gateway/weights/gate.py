"""Requests are planned while the gate is open. Behind it they queue, and do not fail."""

from __future__ import annotations

import asyncio


class Gate:
    """Closed while somebody holds it: a pause, a session, an update, released memory."""

    def __init__(self) -> None:
        self.holders: set[str] = set()
        self.closings = 0
        """How often it was closed: what was planned before is not to be begun any more."""
        self._open = asyncio.Event()
        self._open.set()

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    def hold(self, who: str) -> None:
        self.holders.add(who)
        if self._open.is_set():
            self.closings += 1
            self._open.clear()

    def release(self, who: str) -> None:
        self.holders.discard(who)
        if not self.holders:
            self._open.set()

    async def wait_open(self) -> None:
        await self._open.wait()
