"""Makes written blocks durable in groups, slab by slab, in threads of its own."""

from __future__ import annotations

import time
from collections.abc import Callable

from storage.ssd.owner_numbers import OwnerNumbers
from storage.ssd.slab import Slab, Written
from storage.tiers.io_threads import IoThreads
from storage.tiers.operation import Operation

SYNC_THREADS = 8
"""Slabs that are synced at once."""


class GroupSync:
    """``hand_back`` is called from a thread with each write that is durable or failed."""

    def __init__(
        self, name: str, owners: OwnerNumbers, hand_back: Callable[[Operation], None]
    ) -> None:
        self._owners = owners
        self._hand_back = hand_back
        self._threads = IoThreads(f"sync {name}", SYNC_THREADS)

    def close(self, timeout_s: float) -> bool:
        """See :meth:`storage.tiers.io_threads.IoThreads.close`."""
        return self._threads.close(timeout_s)

    def sync_later(self, written: Written) -> None:
        """Sync the block together with all that are written to its slab until then. For any
        thread."""
        slab = written.slab
        slab.unsynced.append(written)
        if slab.sync_turn.acquire(blocking=False):
            self._threads.submit(lambda: self._sync_slab(slab))

    def _sync_slab(self, slab: Slab) -> None:
        """With the slab's turn. Slabs are synced side by side: a disk makes one flush of many."""
        while True:
            while group := [slab.unsynced.popleft() for _ in range(len(slab.unsynced))]:
                self._sync_group(slab, group)
            slab.sync_turn.release()
            # what came before the release left its sync to this thread
            if not slab.unsynced or not slab.sync_turn.acquire(blocking=False):
                return

    def _sync_group(self, slab: Slab, group: list[Written]) -> None:
        error = self._sync(slab, group)
        now = time.monotonic()
        for operation in (written.operation for written in group):
            operation.error = error
            operation.seconds = now - (operation.started_s or now)
            self._hand_back(operation)

    def _sync(self, slab: Slab, group: list[Written]) -> Exception | None:
        """Make the blocks durable, and with them what the table says of them."""
        try:
            numbers = self._owners.note({written.operation.label.owner for written in group})
            slab.record((each, numbers[each.operation.label.owner]) for each in group)
            slab.file.sync()
        except Exception as error:  # it ends this group, and not the slab's turn to sync
            return error
        return None
