"""Operations from submission to completion: their order, the owner's wake-up, and counters.

Per key, a write or a removal never overlaps another operation: it waits until the key is idle.
Everything belongs to the owner's thread but for :meth:`OperationQueue.hand_back` and
:meth:`OperationQueue.wake`, which any thread may call.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterator

from common.block import BlockKey
from storage.block_format import UnknownVersion
from storage.tiers.contract import (
    BlockCorrupt,
    BlockMissing,
    Completion,
    IoStats,
    TierBusy,
    Wake,
)
from storage.tiers.operation import Kind, Operation

BLOCKS_MAX = 65536


class OperationQueue:
    """An operation is entered, admitted, and then started, or postponed while its key is busy;
    I/O threads carry it out and hand it back; the owner takes it back and ends it. One that
    need not, or cannot, be carried out is refused instead."""

    def __init__(self, on_wake: Wake) -> None:
        self._on_wake = on_wake
        self._is_woken = False
        self._in_flight: set[Operation] = set()
        self._busy: Counter[BlockKey] = Counter()
        self._postponed: defaultdict[BlockKey, deque[Operation]] = defaultdict(deque)
        self._num_postponed = 0
        self._handed_back: deque[Operation] = deque()
        self._completions: list[Completion] = []
        self.stats = IoStats()
        """Live; the owner counts here as well."""

    # ---- in -------------------------------------------------------------------------

    def enter(self, operation: Operation) -> None:
        """A block's read or write counts from now on, until it completes."""
        if operation.kind is Kind.READ:
            self.stats.read_queue_bytes += operation.nbytes
            self.stats.reads_in_flight += 1
        else:
            self.stats.write_queue_bytes += operation.nbytes
            self.stats.writes_in_flight += 1

    def admit(self, operation: Operation) -> bool:
        """False: the queue is full, and the operation was refused."""
        if len(self._in_flight) + self._num_postponed < BLOCKS_MAX:
            return True
        self.refuse(operation, TierBusy(f"{BLOCKS_MAX} blocks are queued"))
        return False

    def start(self, operation: Operation) -> None:
        """It is about to be carried out; its key is busy."""
        self._in_flight.add(operation)
        self._busy[operation.key] += 1

    def postpone(self, write: Operation) -> None:
        """Until :meth:`next_write` gives it, when its key is idle."""
        self._postponed[write.key].append(write)
        self._num_postponed += 1

    def refuse(self, operation: Operation, error: Exception | None) -> None:
        """Complete an operation that never started; without an error it had nothing to do."""
        operation.error = error
        self._complete(operation)
        self.wake()

    # ---- back -----------------------------------------------------------------------

    def hand_back(self, operation: Operation) -> None:
        """It was carried out."""
        self._handed_back.append(operation)
        self.wake()

    def wake(self) -> None:
        """Have the owner poll: once for all that happens until it does."""
        if not self._is_woken:
            self._is_woken = True
            self._on_wake()

    def take_back(self) -> Iterator[Operation]:
        """What was handed back until now, but for what has ended already."""
        self._is_woken = False  # before looking: what comes later wakes again
        while self._handed_back:
            operation = self._handed_back.popleft()
            if operation in self._in_flight:
                yield operation

    def end(self, operation: Operation) -> None:
        """A started operation completes, and keeps its key busy no longer. A removal, which
        nobody waits for, just ends."""
        self._in_flight.discard(operation)
        self._busy[operation.key] -= 1
        if not self._busy[operation.key]:
            del self._busy[operation.key]
        if operation.kind is not Kind.REMOVE:
            self._complete(operation)

    def next_write(self, key: BlockKey) -> Operation | None:
        """The first write that was postponed, once the key is idle."""
        if self._busy[key] or key not in self._postponed:
            return None
        postponed = self._postponed[key]
        write = postponed.popleft()
        self._num_postponed -= 1
        if not postponed:
            del self._postponed[key]
        return write

    def _complete(self, operation: Operation) -> None:
        is_write, error, stats = operation.kind is Kind.WRITE, operation.error, self.stats
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

    # ---- questions ------------------------------------------------------------------

    @property
    def in_flight(self) -> Collection[Operation]:
        """Started, and not ended."""
        return self._in_flight

    def is_idle(self, key: BlockKey) -> bool:
        return not self._busy[key]

    def take_completions(self) -> list[Completion]:
        """Since the last call."""
        completions, self._completions = self._completions, []
        return completions
