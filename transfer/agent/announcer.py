"""What an agent tells its subscribers unasked: holdings, deliveries and status."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from common.ids import Incarnation
from common.messages.codec import Message
from common.messages.from_agents import AgentStatus, Announcement, Holding

FLUSH_AFTER_S = 0.005
"""Changes are announced together, at most so long after the first of them."""
CHANGES_MAX = 50_000
"""In one message."""
STATUS_EVERY_S = 1.0
"""While nothing changes."""


class Announcer:
    """Sends each subscriber a snapshot, then every change, numbered for that subscriber.

    ``send(identity, message)`` returns False if the subscriber is gone. One whose queue is
    full loses messages, sees the gap in the numbers, and subscribes again.
    """

    def __init__(self, incarnation: Incarnation, send: Callable[[bytes, Message], bool]) -> None:
        self._incarnation = incarnation
        self._send = send
        self._next_sequence: dict[bytes, int] = {}
        self._pending: list[Holding] = []
        self._last_status: AgentStatus | None = None
        self._status_due = 0.0

    def subscribe(self, identity: bytes, holdings: Sequence[Holding]) -> None:
        """Begin, or begin anew, with everything that is held now."""
        self._flush()
        self._next_sequence[identity] = 0
        self._announce(identity, list(holdings[:CHANGES_MAX]))
        for start in range(CHANGES_MAX, len(holdings), CHANGES_MAX):
            self._announce(identity, list(holdings[start : start + CHANGES_MAX]))
        self._last_status = None

    def note(self, change: Holding) -> None:
        """A holding has changed."""
        if not self._pending:
            asyncio.get_running_loop().call_later(FLUSH_AFTER_S, self._flush)
        self._pending.append(change)

    def status(self, status: AgentStatus) -> None:
        """Tell the present status, unless it is known and was told less than a second ago."""
        now = time.monotonic()
        if status == self._last_status and now < self._status_due:
            return
        self._last_status, self._status_due = status, now + STATUS_EVERY_S
        self.tell(status)

    def tell(self, message: Message) -> None:
        """Send every subscriber a message that it can do without."""
        for identity in list(self._next_sequence):
            if not self._send(identity, message):
                del self._next_sequence[identity]

    def _flush(self) -> None:
        changes, self._pending = self._pending, []
        for start in range(0, len(changes), CHANGES_MAX):
            for identity in list(self._next_sequence):
                self._announce(identity, changes[start : start + CHANGES_MAX])

    def _announce(self, identity: bytes, changes: list[Holding]) -> None:
        sequence = self._next_sequence.get(identity)
        if sequence is None:
            return
        message = Announcement(self._incarnation, sequence, sequence == 0, changes)
        self._next_sequence[identity] = sequence + 1
        if not self._send(identity, message):
            del self._next_sequence[identity]
