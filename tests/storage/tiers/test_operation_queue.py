"""What a tier's parts rely on: the order of a key's operations, the wake-up, the counts."""

from __future__ import annotations

import pytest

from storage.tiers import operation_queue
from storage.tiers.contract import BlockMissing, TierBusy
from storage.tiers.operation import Kind, Operation
from storage.tiers.operation_queue import OperationQueue
from tests.storage.conftest import key_of

A, B = key_of(1), key_of(2)


class Owner:
    """Counts how often it is woken."""

    def __init__(self) -> None:
        self.woken = 0
        self.queue = OperationQueue(self._wake)

    def _wake(self) -> None:
        self.woken += 1

    def started(self, kind: Kind, number: int = 1) -> Operation:
        operation = Operation(kind, key_of(number), memoryview(bytearray(100)))
        if kind is not Kind.REMOVE:
            self.queue.enter(operation)
        self.queue.start(operation)
        return operation


def test_a_key_is_idle_when_all_of_its_operations_have_ended() -> None:
    owner = Owner()
    queue = owner.queue
    reads = [owner.started(Kind.READ) for _ in range(2)]
    assert not queue.is_idle(A) and queue.is_idle(B)
    queue.end(reads[0])
    assert not queue.is_idle(A)
    queue.end(reads[1])
    assert queue.is_idle(A) and not queue.in_flight


def test_postponed_writes_come_one_by_one_when_their_key_is_idle() -> None:
    owner = Owner()
    queue, read = owner.queue, owner.started(Kind.READ)
    writes = [Operation(Kind.WRITE, A, memoryview(b"x")) for _ in range(2)]
    for write in writes:
        queue.enter(write)
        queue.postpone(write)
    assert queue.next_write(A) is None and queue.next_write(B) is None
    queue.end(read)
    assert queue.next_write(A) is writes[0]
    queue.start(writes[0])
    assert queue.next_write(A) is None
    queue.end(writes[0])
    assert queue.next_write(A) is writes[1] and queue.next_write(A) is None


def test_the_owner_is_woken_once_until_it_looks() -> None:
    owner = Owner()
    operations = [owner.started(Kind.READ, i) for i in range(3)]
    for operation in operations[:2]:
        owner.queue.hand_back(operation)
    assert owner.woken == 1
    assert list(owner.queue.take_back()) == operations[:2]
    owner.queue.hand_back(operations[2])
    assert owner.woken == 2


def test_what_has_ended_already_is_not_taken_back() -> None:
    owner = Owner()
    given_up = owner.started(Kind.READ)
    given_up.error = TimeoutError()
    owner.queue.end(given_up)
    owner.queue.hand_back(given_up)
    assert list(owner.queue.take_back()) == []
    assert len(owner.queue.take_completions()) == 1


def test_reads_and_writes_are_counted_from_entry_to_end() -> None:
    owner = Owner()
    queue, stats = owner.queue, owner.queue.stats
    read, write = owner.started(Kind.READ), owner.started(Kind.WRITE, 2)
    assert (stats.reads_in_flight, stats.writes_in_flight) == (1, 1)
    assert (stats.read_queue_bytes, stats.write_queue_bytes) == (100, 100)
    queue.end(read)
    write.error = OSError()
    queue.end(write)
    assert (stats.reads_in_flight, stats.writes_in_flight) == (0, 0)
    assert (stats.read_queue_bytes, stats.write_queue_bytes) == (0, 0)
    assert (stats.hits_total, stats.write_errors_total) == (1, 1)
    assert stats.read_latency.count == 1 and stats.write_latency.count == 0
    assert [(c.key, c.is_write) for c in queue.take_completions()] == [(A, False), (B, True)]
    assert queue.take_completions() == []


def test_a_removal_keeps_its_key_busy_and_completes_nothing() -> None:
    owner = Owner()
    removal = owner.started(Kind.REMOVE)
    assert not owner.queue.is_idle(A)
    owner.queue.end(removal)
    assert owner.queue.is_idle(A) and owner.queue.take_completions() == []


def test_a_full_queue_refuses_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation_queue, "BLOCKS_MAX", 1)
    owner = Owner()
    owner.started(Kind.READ)
    second = Operation(Kind.READ, B, memoryview(bytearray(100)))
    owner.queue.enter(second)
    assert not owner.queue.admit(second) and owner.woken == 1
    (completion,) = owner.queue.take_completions()
    assert completion.key == B and isinstance(completion.error, TierBusy)
    assert owner.queue.stats.reads_in_flight == 1


def test_what_is_refused_counts_by_its_reason() -> None:
    owner = Owner()
    read = Operation(Kind.READ, A, memoryview(bytearray(100)))
    owner.queue.enter(read)
    owner.queue.refuse(read, BlockMissing("not here"))
    stats = owner.queue.stats
    assert (stats.missing_blocks_total, stats.read_errors_total, stats.hits_total) == (1, 1, 0)
