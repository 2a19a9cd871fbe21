"""A block of code that others can end: the one way in which a request's waits are bounded."""

from __future__ import annotations

import asyncio
from types import TracebackType


class CancelScope:
    """``async with``: the block ends at ``timeout_s``, or when :meth:`cancel` is called.

    The block is left with the given error (``on_timeout`` at the limit), whatever it
    was waiting for.
    """

    def __init__(self, timeout_s: float, on_timeout: Exception) -> None:
        self._scope = asyncio.timeout(timeout_s)
        self._error = on_timeout
        self._cancelled = False

    def cancel(self, error: Exception) -> None:
        """End the block with ``error``; only the first call has an effect."""
        if not self._cancelled and not self._scope.expired():
            self._cancelled = True
            self._error = error
            self._scope.reschedule(asyncio.get_running_loop().time())

    async def __aenter__(self) -> CancelScope:
        await self._scope.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cancelled = True
        try:
            await self._scope.__aexit__(kind, error, trace)
        except TimeoutError:
            raise self._error from error
