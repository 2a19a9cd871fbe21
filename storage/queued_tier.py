"""What every tier does alike: index, room, queue, completions and counters.

All bookkeeping belongs to the owner's thread. I/O threads carry operations out and
hand them back through ``_done``; they see no index. Per key, a write or a
removal never overlaps another operation: it waits until the key is idle.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Sequence

from storage.block import BlockKey
from storage.block_format import HEADER_BYTES, UnknownVersion
from storage.tier import (
    BlockCorrupt,
    BlockIO,
    BlockMissing,
    Completion,
    HoldingChange,
    TierBusy,
    TierFull,
    TierName,
    TierStats,
    Wake,
)
from storage.tier_operation import Kind, Operation

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 3.0


class QueuedTier(ABC):
    """A :class:`storage.tier.Tier` but for the bytes, which a subclass moves.

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
    ) -> None:
        self.name = name
        self._on_wake = on_wake
        self._is_woken = False
        self._queue_blocks_max = queue_blocks_max
        self._index: OrderedDict[BlockKey, int] = OrderedDict()
        """Place of each block, least recently used first."""
        self._inflight: set[Operation] = set()
        self._waiting: defaultdict[BlockKey, deque[Operation]] = defaultdict(deque)
        """Writes whose key still has another operation."""
        self._waiting_writes = 0
        self._busy: Counter[BlockKey] = Counter()
        self._done: deque[Operation] = deque()
        self._completions: list[Completion] = []
        self._changes: list[HoldingChange] = []
        self._stats = TierStats(capacity_bytes=capacity_bytes)

    @abstractmethod
    def close(self) -> None:
        """End I/O within seconds and release files and threads."""

    @abstractmethod
    def _launch(self, operation: Operation) -> None:
        """Have I/O threads carry it out, and then hand it back (:meth:`_hand_back`)."""

    # ---- the contract ---------------------------------------------------------------

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        return list(map(self._index.__contains__, keys))

    def keys(self) -> list[BlockKey]:
        return list(self._index)

    def stats(self) -> TierStats:
        self._stats.blocks = len(self._index)
        return copy.copy(self._stats)

    def touch(self, keys: Sequence[BlockKey]) -> None:
        for key in reversed(keys):
            if key in self._index:
                self._index.move_to_end(key)

    def submit_reads(self, blocks: Sequence[BlockIO]) -> None:
        self.touch([block.key for block in blocks])
        for block in blocks:
            operation = Operation(Kind.READ, block.key, block.buffer)
            operation.place = self._index.get(block.key)
            self._stats.read_queue_bytes += operation.nbytes
            if self.index_is_complete and operation.place is None:
                self._refuse(operation, BlockMissing("not in the index"))
            elif self._queue_is_full():
                self._refuse(operation, TierBusy(f"{self._queue_blocks_max} blocks are queued"))
            else:
                self._start(operation)

    def submit_writes(self, blocks: Sequence[BlockIO]) -> None:
        for block in blocks:
            operation = Operation(Kind.WRITE, block.key, block.buffer, block.label)
            self._stats.write_queue_bytes += operation.nbytes
            if self._queue_is_full():
                self._refuse(operation, TierBusy(f"{self._queue_blocks_max} blocks are queued"))
            elif self._busy[block.key] and block.key not in self._index:
                self._waiting[block.key].append(operation)
                self._waiting_writes += 1
            else:
                self._begin_write(operation)

    def poll(self) -> list[Completion]:
        self._is_woken = False  # before looking: what comes later wakes again
        self._drain()
        completions, self._completions = self._completions, []
        return completions

    def take_changes(self) -> list[HoldingChange]:
        changes, self._changes = self._changes, []
        return changes

    def _drain(self) -> None:
        """End what the I/O threads have handed back, but for what was given up."""
        while self._done:
            operation = self._done.popleft()
            if operation in self._inflight:
                self._end(operation)

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
            stats.write_errors_total += error is not None
        else:
            stats.read_queue_bytes -= operation.nbytes
            stats.read_errors_total += error is not None
            stats.corrupt_blocks_total += isinstance(error, BlockCorrupt)
            stats.missing_blocks_total += isinstance(error, BlockMissing)
            stats.other_version_blocks_total += isinstance(error, UnknownVersion)
        self._completions.append(
            Completion(operation.key, is_write, error, operation.seconds, operation.label)
        )

    # ---- what is held ---------------------------------------------------------------

    def _end_read(self, operation: Operation) -> None:
        key, error = operation.key, operation.error
        if error is None:
            self._stats.read_bytes_total += operation.nbytes
            if key not in self._index:
                self._found(key, HEADER_BYTES + operation.nbytes)
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
        if operation.key in self._index:
            self._refuse(operation, None)
            return
        operation.place = self._reserve(operation.nbytes)
        if operation.place is None:
            self._refuse(operation, TierFull(f"no room for {operation.nbytes} bytes"))
        else:
            self._start(operation)

    def _end_write(self, operation: Operation) -> None:
        assert operation.place is not None
        if operation.error is None:
            self._stats.write_bytes_total += operation.nbytes
            self._gain(operation.key, operation.place)
        else:
            self._release(operation.place)

    def _reserve(self, nbytes: int) -> int | None:
        """A place for a block, for which others are evicted; None: there is no room."""
        stored_bytes = HEADER_BYTES + nbytes
        if self._stats.capacity_bytes:
            missing_bytes = self._stats.used_bytes + stored_bytes - self._stats.capacity_bytes
            victims = []
            for key, held_bytes in self._index.items():
                if missing_bytes <= 0:
                    break
                if not self._busy[key]:
                    victims.append(key)
                    missing_bytes -= held_bytes
            if missing_bytes > 0:
                return None
            for victim in victims:
                self._release(self._evict(victim))
                self._start_remove(victim, None)
        self._stats.used_bytes += stored_bytes
        return stored_bytes

    def _release(self, place: int | None) -> None:
        """Nothing lies in the place any more; None is ignored."""
        self._stats.used_bytes -= place or 0

    def _found(self, key: BlockKey, stored_bytes: int) -> None:
        """The block was here all the time."""
        self._stats.used_bytes += stored_bytes
        self._gain(key, stored_bytes)

    def _gain(self, key: BlockKey, place: int) -> None:
        self._index[key] = place
        self._changes.append(HoldingChange(key, True))

    def _evict(self, key: BlockKey) -> int | None:
        self._stats.evicted_blocks_total += 1
        return self._lose(key)

    def _lose(self, key: BlockKey) -> int | None:
        """Take a block out of the index; returns its place, to be released."""
        place = self._index.pop(key, None)
        if place is not None:
            self._changes.append(HoldingChange(key, False))
        return place
