"""What every tier does alike: index, room, queue, completions and counters.

All bookkeeping belongs to the owner's thread. I/O threads carry operations out and
hand them back through ``_done``; they see no index. Per key, a write or a
removal never overlaps another operation: it waits until the key is idle.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict, deque
from collections.abc import Sequence

from common.block import UNLABELLED, BlockKey, BlockLabel, BlockOwner, TierName
from storage.block_format import HEADER_BYTES, UnknownVersion
from storage.index.held_blocks import HeldBlocks
from storage.index.owners import Quota, Selector
from storage.tiers.contract import (
    BlockCorrupt,
    BlockIO,
    BlockMissing,
    Completion,
    EvictionCause,
    HoldingChange,
    TierBusy,
    TierFull,
    TierStats,
    Wake,
)
from storage.tiers.operation import Kind, Operation

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 3.0


class QueuedTier(ABC):
    """A :class:`storage.tiers.contract.Tier` but for the bytes, which a subclass moves.

    Each block has a *place*, a number. Here it is the bytes that it takes of
    ``capacity_bytes``, where 0 means that the tier does not bound or evict what it holds; a
    tier with places in a stricter sense overrides ``_reserve`` and ``_release``.
    ``index_is_complete``: a block that is not in the index is certainly not here.
    ``removed_on``: read errors after which the stored bytes are removed.
    """

    index_is_complete = True
    removed_on: tuple[type[Exception], ...] = (BlockCorrupt,)

    def __init__(
        self,
        name: TierName,
        on_wake: Wake,
        capacity_bytes: int = 0,
        queue_blocks_max: int = 65536,
        quotas: Sequence[Quota] = (),
    ) -> None:
        self.name = name
        self._on_wake = on_wake
        self._is_woken = False
        self._queue_blocks_max = queue_blocks_max
        self._index = HeldBlocks(self._bytes_at, quotas)
        self._inflight: set[Operation] = set()
        self._waiting: defaultdict[BlockKey, deque[Operation]] = defaultdict(deque)
        """Writes whose key still has another operation."""
        self._waiting_writes = 0
        self._busy: Counter[BlockKey] = Counter()
        self._done: deque[Operation] = deque()
        self._completions: list[Completion] = []
        self._stats = TierStats(capacity_bytes=capacity_bytes)

    @abstractmethod
    def close(self) -> None:
        """End I/O within seconds and release files and threads."""

    @abstractmethod
    def _launch(self, operation: Operation) -> None:
        """Have I/O threads carry it out, and then hand it back (:meth:`_hand_back`)."""

    # ---- the contract ---------------------------------------------------------------

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        return self._index.contains(keys)

    def keys(self) -> list[BlockKey]:
        return list(self._index)

    def stats(self) -> TierStats:
        self._stats.blocks = len(self._index)
        return self._stats.snapshot()

    def usage(self) -> list[tuple[BlockOwner, int, int]]:
        """(owner, blocks, bytes) of each owner of blocks here."""
        return self._index.owners.usage()

    def touch(self, keys: Sequence[BlockKey]) -> None:
        self._index.touch(keys)

    def drop(self, selector: Selector) -> None:
        self._index.drop(selector)
        self._wake()

    def take_drops(self) -> list[Selector]:
        return []

    def submit_reads(self, blocks: Sequence[BlockIO]) -> None:
        self._index.refresh([block.key for block in blocks])
        for block in blocks:
            operation = Operation(Kind.READ, block.key, block.buffer)
            operation.place = self._index.get(block.key)
            self._stats.read_queue_bytes += operation.nbytes
            self._stats.reads_in_flight += 1
            certainly_not_here = self.index_is_complete or self._index.is_dropped(block.key)
            if certainly_not_here and operation.place is None:
                self._refuse(operation, BlockMissing("not in the index"))
            elif self._queue_is_full():
                self._refuse(operation, TierBusy(f"{self._queue_blocks_max} blocks are queued"))
            else:
                self._start(operation)

    def submit_writes(self, blocks: Sequence[BlockIO]) -> None:
        for block in blocks:
            operation = Operation(Kind.WRITE, block.key, block.buffer, block.label)
            self._stats.write_queue_bytes += operation.nbytes
            self._stats.writes_in_flight += 1
            if self._queue_is_full():
                self._refuse(operation, TierBusy(f"{self._queue_blocks_max} blocks are queued"))
            else:
                self._begin_write(operation)

    def poll(self) -> list[Completion]:
        self._is_woken = False  # before looking: what comes later wakes again
        self._drain()
        completions, self._completions = self._completions, []
        return completions

    def take_changes(self) -> list[HoldingChange]:
        return self._index.take_changes()

    def _drain(self) -> None:
        """End what the I/O threads have handed back, but for what was given up."""
        while self._done:
            operation = self._done.popleft()
            if operation in self._inflight:
                self._end(operation)
        self._reclaim()

    # ---- running an operation -------------------------------------------------------

    def _queue_is_full(self) -> bool:
        return len(self._inflight) + self._waiting_writes >= self._queue_blocks_max

    def _start(self, operation: Operation) -> None:
        self._inflight.add(operation)
        self._busy[operation.key] += 1
        self._launch(operation)

    def _hand_back(self, operation: Operation) -> None:
        """To the owner's thread."""
        self._done.append(operation)
        self._wake()

    def _wake(self) -> None:
        """Once for all that happens until the owner polls."""
        if not self._is_woken:
            self._is_woken = True
            self._on_wake()

    def _refuse(self, operation: Operation, error: Exception | None) -> None:
        """Complete an operation that never started."""
        operation.error = error
        self._complete(operation)
        self._wake()

    def _end(self, operation: Operation) -> None:
        self._inflight.discard(operation)
        if operation.kind is Kind.REMOVE:
            self._end_remove(operation)
        else:
            self._complete(operation)
        if operation.kind is Kind.READ:
            self._end_read(operation)
        elif operation.kind is Kind.WRITE:
            self._end_write(operation)
        self._leave(operation.key)

    def _leave(self, key: BlockKey) -> None:
        """One operation of ``key`` less; when it is idle, its next write begins."""
        self._busy[key] -= 1
        if self._busy[key] == 0:
            del self._busy[key]
        while not self._busy[key] and key in self._waiting:
            waiting = self._waiting[key]
            operation = waiting.popleft()
            self._waiting_writes -= 1
            if not waiting:
                del self._waiting[key]
            self._begin_write(operation)

    def _complete(self, operation: Operation) -> None:
        is_write, error, stats = operation.kind is Kind.WRITE, operation.error, self._stats
        if is_write:
            stats.write_queue_bytes -= operation.nbytes
            stats.writes_in_flight -= 1
            stats.write_errors_total += error is not None
        else:
            stats.read_queue_bytes -= operation.nbytes
            stats.reads_in_flight -= 1
            stats.read_errors_total += error is not None
            stats.corrupt_blocks_total += isinstance(error, BlockCorrupt)
            stats.missing_blocks_total += isinstance(error, BlockMissing)
            stats.other_version_blocks_total += isinstance(error, UnknownVersion)
            stats.hits_total += error is None
        if error is None:
            latency = stats.write_latency if is_write else stats.read_latency
            latency.note(time.monotonic() - operation.submitted_s)
        self._completions.append(
            Completion(operation.key, is_write, error, operation.seconds, operation.label)
        )

    # ---- what is held ---------------------------------------------------------------

    def _end_read(self, operation: Operation) -> None:
        key, error = operation.key, operation.error
        if error is None:
            self._stats.read_bytes_total += operation.nbytes
            if key not in self._index:
                self._found(key, HEADER_BYTES + operation.nbytes, operation.label)
        elif isinstance(error, (BlockCorrupt, BlockMissing)):
            place = self._lose(key)
            if not isinstance(error, self.removed_on):
                self._release(place)
            elif place is not None or not self.index_is_complete:
                self._start_remove(key, place)

    def _start_remove(self, key: BlockKey, place: int | None) -> None:
        """Delete what is stored; its place is released after that."""
        removal = Operation(Kind.REMOVE, key)
        removal.place = place
        self._start(removal)

    def _end_remove(self, operation: Operation) -> None:
        if operation.error is not None:
            logger.warning("%s tier cannot remove a block: %s", self.name.value, operation.error)
        self._release(operation.place)

    def _begin_write(self, operation: Operation) -> None:
        key = operation.key
        if key in self._index:
            self._refuse(operation, None)
            return
        if self._index.is_dropped(key) and not self._busy[key]:
            self._evict(key, EvictionCause.DROPPED)
        if self._busy[key]:
            self._waiting[key].append(operation)
            self._waiting_writes += 1
            return
        owners, stored_bytes = self._index.owners, self._stored_bytes(operation.nbytes)
        operation.group = owners.group_of(operation.label.owner)
        try:
            self._make_quota_room(operation.group, stored_bytes)
        except TierFull as error:
            self._refuse(operation, error)
            return
        operation.place = self._reserve(operation.nbytes)
        if operation.place is None:
            self._refuse(operation, TierFull(f"no room for {operation.nbytes} bytes"))
        else:
            owners.note(operation.group, 0, stored_bytes)
            self._start(operation)

    def _end_write(self, operation: Operation) -> None:
        assert operation.place is not None
        self._index.owners.note(operation.group, 0, -self._stored_bytes(operation.nbytes))
        if operation.error is None:
            self._stats.write_bytes_total += operation.nbytes
            self._gain(operation.key, operation.place, operation.label)
            if operation.group != self._index.owners.group_of(operation.label.owner):
                self._evict(operation.key, EvictionCause.DROPPED)  # while it was written
        else:
            self._release(operation.place)

    def _make_quota_room(self, group: int, nbytes: int) -> None:
        """Evict among those who share a full quota; TierFull if none of them is idle."""
        while (victim := self._index.quota_victim(group, nbytes, self._is_idle)) is not None:
            self._evict(victim, EvictionCause.QUOTA)

    def _is_idle(self, key: BlockKey) -> bool:
        return not self._busy[key]

    def _stored_bytes(self, nbytes: int) -> int:
        """What a block of so many bytes takes here."""
        return HEADER_BYTES + nbytes

    def _bytes_at(self, place: int) -> int:
        """What the block in this place takes."""
        return place

    def _reserve(self, nbytes: int) -> int | None:
        """A place for a block, for which others are evicted; None: there is no room."""
        stored_bytes, stats = self._stored_bytes(nbytes), self._stats
        if stats.capacity_bytes:
            if stored_bytes > stats.capacity_bytes:
                return None
            victims = self._index.victims(self._is_idle)
            while stats.used_bytes + stored_bytes > stats.capacity_bytes:
                if (victim := next(victims, None)) is None:
                    return None
                self._evict(victim, EvictionCause.CAPACITY)
        stats.used_bytes += stored_bytes
        return stored_bytes

    def _release(self, place: int | None) -> None:
        """Nothing lies in the place any more; None is ignored."""
        self._stats.used_bytes -= place or 0

    def _found(self, key: BlockKey, stored_bytes: int, label: BlockLabel = UNLABELLED) -> None:
        """The block was here all the time."""
        self._stats.used_bytes += stored_bytes
        self._gain(key, stored_bytes, label)

    def _gain(self, key: BlockKey, place: int, label: BlockLabel = UNLABELLED) -> None:
        self._index.add(key, place, label)

    def _evict(self, key: BlockKey, cause: EvictionCause) -> None:
        """An idle block goes though it is whole."""
        evictions = self._stats.evictions_total
        evictions[cause] = evictions.get(cause, 0) + 1
        self._release(self._lose(key))
        self._erase(key)

    def _erase(self, key: BlockKey) -> None:
        """Remove what is stored of a block that is held no more."""
        self._start_remove(key, None)

    def _lose(self, key: BlockKey) -> int | None:
        """Take a block out of the index; returns its place, to be released."""
        return self._index.pop(key)

    def _reclaim(self) -> None:
        """Take some dropped blocks out; those in use go later."""
        idle = [key for key in self._index.some_dropped() if self._is_idle(key)]
        for key in idle:
            self._evict(key, EvictionCause.DROPPED)
        if idle:
            self._wake()
