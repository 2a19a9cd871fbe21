"""A tier out of its parts: what is held, what is under way, and what moves the bytes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from common.block import BlockKey, TierName
from common.messages.from_agents import Holding
from storage.index.owners import OwnerGroups, Selector
from storage.tiers.contract import (
    BlockCorrupt,
    BlockIO,
    BlockMissing,
    Completion,
    EvictionCause,
    TierFull,
    TierStats,
)
from storage.tiers.operation import Kind, Operation
from storage.tiers.operation_queue import OperationQueue
from storage.tiers.placement import Backend
from storage.tiers.room import Room

logger = logging.getLogger(__name__)


class BlockTier:
    """A :class:`storage.tiers.contract.Tier`. Every kind has this flow of reads and writes; a
    kind is made by the :class:`storage.tiers.placement.Placement` of its room and by its
    :class:`storage.tiers.placement.Backend`.

    ``index_is_complete``: a block that is not held is certainly not here.
    """

    def __init__(
        self,
        name: TierName,
        queue: OperationQueue,
        room: Room,
        backend: Backend,
        index_is_complete: bool = True,
    ) -> None:
        self.name = name
        self._queue = queue
        self._room = room
        self._held = room.held
        self._backend = backend
        self._index_is_complete = index_is_complete

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        return self._held.contains(keys)

    def keys(self) -> list[BlockKey]:
        return list(self._held)

    def touch(self, keys: Sequence[BlockKey], replaced: Sequence[BlockKey] = ()) -> None:
        self._held.index.touch(keys, replaced)

    def submit_reads(self, blocks: Sequence[BlockIO]) -> None:
        held, queue, started = self._held, self._queue, []
        held.index.refresh([block.key for block in blocks])
        for block in blocks:
            operation = Operation(Kind.READ, block.key, block.buffer)
            operation.place = held.get(block.key)
            queue.enter(operation)
            certainly_not_here = self._index_is_complete or held.is_dropped(block.key)
            if certainly_not_here and operation.place is None:
                queue.refuse(operation, BlockMissing("not in the index"))
            elif queue.admit(operation):
                queue.start(operation)
                started.append(operation)
        self._backend.start(started)

    def submit_writes(self, blocks: Sequence[BlockIO]) -> None:
        for block in blocks:
            operation = Operation(Kind.WRITE, block.key, block.buffer, block.label)
            self._queue.enter(operation)
            if self._queue.admit(operation):
                self._begin_write(operation)

    def poll(self) -> list[Completion]:
        for operation in self._queue.take_back():
            if self._backend.accept(operation):
                self._end(operation)
        for operation in self._backend.tend():
            self._end(operation)
        if self._room.reclaim():
            self._queue.wake()
        return self._queue.take_completions()

    def take_changes(self) -> list[Holding]:
        return self._held.take_changes()

    def drop(self, selector: Selector) -> None:
        self._backend.drop(selector)
        self._held.drop(selector)
        self._queue.wake()

    def take_drops(self) -> list[Selector]:
        return self._backend.take_drops()

    def stats(self) -> TierStats:
        return self._backend.stats()

    @property
    def owners(self) -> OwnerGroups:
        """Whose blocks are here."""
        return self._held.owners

    def close(self) -> None:
        self._backend.close()

    # ---- the way of an operation ------------------------------------------------------

    def _begin_write(self, write: Operation) -> None:
        key, queue = write.key, self._queue
        if key in self._held:
            queue.refuse(write, None)
            return
        if self._held.is_dropped(key) and queue.is_idle(key):
            self._room.evict(key, EvictionCause.DROPPED)
        if not queue.is_idle(key):
            queue.postpone(write)
            return
        try:
            self._room.reserve(write)
        except TierFull as error:
            queue.refuse(write, error)
            return
        queue.start(write)
        self._backend.start([write])

    def _end(self, operation: Operation) -> None:
        self._queue.end(operation)
        if operation.kind is Kind.READ:
            self._end_read(operation)
        elif operation.kind is Kind.WRITE:
            if operation.error is None:
                self._queue.stats.write_bytes_total += operation.nbytes
            self._room.settle(operation)
        else:  # the place of what was removed is free only now
            if operation.error is not None:
                logger.warning("%s tier cannot remove: %s", self.name.value, operation.error)
            self._room.release(operation.place)
        while (write := self._queue.next_write(operation.key)) is not None:
            self._begin_write(write)

    def _end_read(self, read: Operation) -> None:
        key, error = read.key, read.error
        if error is None:
            self._queue.stats.read_bytes_total += read.nbytes
            if read.place is None and key not in self._held.index:
                self._room.adopt(read)
        elif isinstance(error, (BlockCorrupt, BlockMissing)):
            place = self._held.pop(key)
            if not isinstance(error, self._backend.removed_on):
                self._room.release(place)
            elif place is not None or not self._index_is_complete:
                removal = Operation(Kind.REMOVE, key)
                removal.place = place
                self._queue.start(removal)
                self._backend.start([removal])
