"""The order in which a queue transfers layers, and how transfers end."""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from typing import Any, cast

import numpy as np
import pytest

from common.block import BlockLayout
from common.board_word import FAILED, board_word
from common.ids import JobId
from transfer.agent.jobs import transfer
from transfer.agent.jobs.transfer import DeadlinePassed, Group, JobCancelled, QueueFull, Transfer
from transfer.agent.jobs.transfer_queue import TransferQueue
from transfer.mooncake import PeerSuspended, TransferFailed
from transfer.pacing.pacer import Pacer

LAYOUT = BlockLayout(4, 3, (64, 32))
BOARD = 1 << 40
"""Board addresses are far from all others."""


class FakePeer:
    """Records what is transferred; ``gate`` holds transfers up, ``fails`` makes them fail."""

    def __init__(self) -> None:
        self.transfers: queue.Queue[tuple[str, int]] = queue.Queue()
        self.words: list[int] = []
        self.gate = threading.Semaphore(1_000_000)
        self.fails: set[str] = set()
        self._scratch: list[tuple[int, int]] = []

    def register(self, address: int, length: int) -> None:
        self._scratch.append((address, length))

    def forgive(self, session_id: str) -> None:
        pass

    def write(
        self, session_id, src, dst, lengths, before_batch=lambda nbytes: None, batch_bytes=0
    ) -> None:
        if dst[0] >= BOARD:
            if session_id in self.fails:
                raise PeerSuspended(session_id, 1.0)
            base = self._scratch[0][0]
            words = np.ctypeslib.as_array((ctypes.c_uint64 * 4).from_address(base))
            self.words.append(int(words[(src[0] - base) // 8]))
            return
        before_batch(int(lengths.sum()))
        self.transfers.put((session_id, int(src[0])))
        assert self.gate.acquire(timeout=10)
        if session_id in self.fails:
            raise TransferFailed(session_id, "write", -1)
        before_batch(int(lengths.sum()))

    read = write


class World:
    def __init__(self, threads: int = 1, pacer: Pacer | None = None) -> None:
        self.peer = FakePeer()
        self.ends: queue.Queue[tuple[int, Exception | None]] = queue.Queue()
        paced = {"own": None}
        post, towards = (lambda call: call()), (lambda session: paced.get(session, pacer))
        self.queue = TransferQueue(cast(Any, self.peer), "test", threads, 4, post, towards)
        self.jobs = 0

    def submit(self, session="p0", plan=1, urgent=False, deadline_s=10.0, **fields):
        self.jobs += 1
        number = self.jobs
        addresses, slots = np.zeros((3, 2), np.int64), np.array([1000 * number], np.int64)
        job = Transfer(
            JobId(number),
            session,
            [Group(LAYOUT, addresses, slots, np.array([0], np.int64))],
            time.monotonic() + deadline_s,
            lambda error: self.ends.put((number, error)),
            urgent=urgent,
            plan=plan,
            board_address=BOARD,
            **fields,
        )
        self.queue.submit(job)
        return job

    def end(self) -> tuple[int, Exception | None]:
        return self.ends.get(timeout=5)

    def moved(self) -> tuple[str, int, int]:
        """The next transfer: engine, job, layer."""
        session, source = self.peer.transfers.get(timeout=5)
        return session, source // 1000, source % 1000 // LAYOUT.layer_start(1)

    def hold(self) -> None:
        """From now on each transfer waits for ``step``."""
        self.peer.gate = threading.Semaphore(0)

    def step(self, transfers: int = 1) -> None:
        self.peer.gate.release(transfers)


@pytest.fixture
def worlds():
    made = []

    def make(threads: int = 1) -> World:
        made.append(World(threads))
        return made[-1]

    yield make
    for world in made:
        world.step(1000)
        world.queue.close(5)


def test_a_layers_batch_has_what_that_layer_has_of_each_part():
    world = World()
    kv = BlockLayout(4, 4, (8,), absent=((1, 3),))
    window = BlockLayout(4, 4, (16,), absent=((0, 3),))
    addresses = np.arange(4).reshape(4, 1) * 1000

    def group(layout: BlockLayout, slot: int, place: int) -> Group:
        return Group(layout, addresses + slot, np.array([slot]), np.array([place]))

    batches = []

    def write(session_id, src, dst, lengths, before_batch=None, batch_bytes=0):
        if dst[0] < BOARD:
            batches.append(list(zip(src.tolist(), dst.tolist(), lengths.tolist(), strict=True)))
        else:
            batches.append([])  # the word that says that a layer is there

    world.peer.write = write  # type: ignore[method-assign]
    job = Transfer(
        JobId(1),
        "p0",
        [group(kv, 100_000, 2), group(window, 200_000, 3)],
        time.monotonic() + 10,
        lambda error: world.ends.put((1, error)),
        board_address=BOARD,
    )
    world.queue.submit(job)
    assert world.end() == (1, None)
    assert batches == [
        *([(100_000, 100_016, 8)], []),
        *([(200_000, 201_048, 16)], []),
        *([(100_008, 102_016, 8), (200_016, 202_048, 16)], []),
        [],  # layer 3 has nothing: its word comes at once
    ]
    assert job.nbytes == kv.block_bytes + window.block_bytes and job.left_nbytes == 0


@pytest.mark.parametrize("limit, turns", [(None, [3]), (4, [2, 1]), (1, [1, 1, 1])])
def test_a_pull_takes_as_many_layers_at_a_turn_as_one_batch_has(limit, turns, worlds, monkeypatch):
    """Nobody waits for one of its layers, and each turn costs the same."""
    if limit is not None:
        monkeypatch.setattr(transfer, "DESCRIPTORS_PER_BATCH", limit)
    world, seen = worlds(), []

    def read(session_id, dst, src, lengths, before_batch=None, batch_bytes=0):
        seen.append(list(zip(dst.tolist(), src.tolist(), lengths.tolist(), strict=True)))

    world.peer.read = read
    addresses = np.arange(6).reshape(3, 2) * 10_000
    group = Group(LAYOUT, addresses, np.array([500]), np.array([7]))
    deadline, end = time.monotonic() + 10, lambda error: world.ends.put((1, error))
    pull = Transfer(JobId(1), "p0", [group], deadline, end, is_read=True)
    world.queue.submit(pull)
    assert world.end() == (1, None)
    assert [len(ranges) // 2 for ranges in seen] == turns
    assert [each for ranges in seen for each in ranges] == [
        *((500, 7 * 64, 64), (564, 10_000 + 7 * 32, 32)),
        *((596, 20_000 + 7 * 64, 64), (660, 30_000 + 7 * 32, 32)),
        *((692, 40_000 + 7 * 64, 64), (756, 50_000 + 7 * 32, 32)),
    ]
    assert pull.nbytes == LAYOUT.block_bytes


def test_layers_go_in_order_and_each_is_told_after_it_has_come(worlds):
    world = worlds()
    world.submit()
    assert world.end() == (1, None)
    assert [world.moved() for _ in range(3)] == [("p0", 1, layer) for layer in range(3)]
    assert world.peer.words == [board_word(JobId(1), layers) for layers in (1, 2, 3)]


def test_a_prefill_engine_overtakes_between_two_layers_and_older_plans_go_first(worlds):
    world = worlds()
    world.hold()
    world.submit("d0", plan=1)
    assert world.moved() == ("d0", 1, 0)
    world.submit("p1", plan=9, urgent=True)
    world.submit("p2", plan=8, urgent=True)
    world.step(9)
    order = [world.moved()[1:] for _ in range(8)]
    assert order == [(3, 0), (3, 1), (3, 2), (2, 0), (2, 1), (2, 2), (1, 1), (1, 2)]
    assert [world.end() for _ in range(3)] == [(3, None), (2, None), (1, None)]


def test_one_engine_never_has_all_workers(worlds):
    world = worlds(threads=2)
    world.hold()
    world.submit("hung", urgent=True)
    world.submit("hung", urgent=True)
    assert world.moved()[0] == "hung"
    world.submit("d0", plan=5)
    assert world.moved()[0] == "d0"


def test_a_cancelled_job_stops_and_ends_once(worlds):
    world = worlds()
    world.hold()
    running, waiting = world.submit("p0"), world.submit("p1", plan=2)
    assert world.moved() == ("p0", 1, 0)
    world.queue.cancel(running)
    world.queue.cancel(waiting)
    time.sleep(0.05)
    assert world.ends.empty()  # its transfer is still under way
    world.step()
    ends = dict([world.end(), world.end()])
    assert all(isinstance(ends[job], JobCancelled) for job in (1, 2))
    assert sorted(world.peer.words) == [board_word(JobId(1), FAILED), board_word(JobId(2), FAILED)]
    world.step(10)
    assert world.ends.empty() and world.peer.transfers.empty() and len(world.queue) == 0


def test_a_deadline_ends_a_job_that_is_still_waiting(worlds):
    world = worlds(threads=2)
    world.hold()
    world.submit("p0", urgent=True)
    world.moved()
    world.submit("p1", urgent=True)
    world.moved()
    world.submit("p1", deadline_s=0.05)
    time.sleep(0.1)
    world.queue.expire()
    world.step(10)
    ends = dict(world.end() for _ in range(3))
    assert ends[1] is None and ends[2] is None and isinstance(ends[3], DeadlinePassed)
    assert all(world.moved()[1] != 3 for _ in range(4))


def test_a_failed_job_ends_with_its_error_and_leaves_room(worlds):
    world = worlds()
    world.peer.fails = {"p0"}
    for expected in range(1, 9):
        world.submit("p0")
        job, error = world.end()
        assert job == expected and isinstance(error, TransferFailed)
    assert not world.peer.words


def test_a_word_that_cannot_be_written_costs_no_worker(worlds):
    world = worlds()
    world.jobs = 1 << 48  # whose board words have more than 64 bits
    for _ in range(2):
        world.submit()
        number, error = world.end()
        assert number == world.jobs and isinstance(error, OverflowError)
    world.jobs = 0
    world.submit()
    assert world.end() == (1, None)


def test_the_queue_is_bounded(worlds):
    world = worlds()
    world.hold()
    for _ in range(4):
        world.submit()
    with pytest.raises(QueueFull):
        world.submit()
    world.step(12)
    assert all(world.end()[1] is None for _ in range(4))
    world.step(3)
    world.submit()
    assert world.end()[1] is None
