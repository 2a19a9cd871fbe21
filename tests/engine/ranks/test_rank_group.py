"""Ranks of an engine: what only the leader hears takes effect at all of them alike."""

from __future__ import annotations

import ctypes
import multiprocessing
import pickle
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.block import BlockKey
from common.ids import BoardSlot, Incarnation, JobId, PlanId
from common.messages.from_gateway import EndPlan, EnginePlan
from engine.config import EngineConfig
from engine.ranks.group import Events, JobOver, RankGroup, SilentLinks
from engine.streams import PASSED, HostPages
from engine.transfers.completion_board import CompletionBoard, OtherBoards
from engine.transfers.deliveries import Deliveries, Delivery
from engine.transfers.jobs import Jobs
from engine.transfers.page_holds import PageHolds
from engine.weights import VariantTaken
from tests.engine.parts import PAGE, Allocator
from tests.examples import examples

CONFIG = EngineConfig(
    name="p0", role="prefill", controls=[], agent="a", agents={}, deliver_timeout_s=10.0
)


class Links:
    """Reaches an agent or not."""

    def __init__(self) -> None:
        self.reachable = True
        self.sent: list = []

    def incarnation(self, agent: str) -> int | None:
        return 5 if self.reachable else None

    def host(self, agent: str) -> str:
        return ""

    def send(self, agent: str, message: object) -> bool:
        self.sent.append(message)
        return self.reachable


RUNNING = cast(Any, SimpleNamespace(query=lambda: False, synchronize=lambda: None))
"""A forward that writes to the pages; it has ended when somebody waits for it."""


class LateWorker:
    """Runs what it was given when it is told to."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []

    def submit(self, session_id: str, call: Callable[[], None]) -> None:
        self._calls.append(call)

    def run(self) -> None:
        while self._calls:
            self._calls.pop(0)()


class Rank:
    """One rank's side of the walk, without SGLang."""

    def __init__(self, rank: int, size: int) -> None:
        self.group = RankGroup(rank, size, None, self.apply)
        self.allocator = cast(Any, Allocator(40))
        self.holds = PageHolds(self.allocator)
        self.jobs = Jobs(Incarnation(7), self.holds, tell=self.tell)
        self.board = CompletionBoard(8, lambda address, length: None)
        self.links = cast(Any, Links() if rank == 0 else SilentLinks())
        self.told: list[tuple[int, int]] = []
        self.deliveries = Deliveries(
            CONFIG,
            self.board,
            self.jobs,
            self.links,
            num_layers=3,
            tell_failure=lambda *failure: self.told.append(failure),
        )

    def apply(self, event) -> None:
        assert isinstance(event, JobOver)
        self.jobs.close(event.job, event.reason)

    def tell(self, job: int, reason: str) -> None:
        self.group.post(JobOver(JobId(job), reason))

    def free(self, pages: list[int]) -> None:
        kept = self.holds.keep_back(torch.tensor(pages))
        self.allocator.free_pages = torch.cat([self.allocator.free_pages, kept])

    def take(self, pages: int) -> list[int]:
        returned = torch.tensor(self.holds.take_returned(), dtype=torch.int64)
        free = torch.cat([self.allocator.free_pages, returned])
        self.allocator.free_pages = free[pages:]
        return free[:pages].tolist()

    def start(self, pages: list[int], agents: list[str]):
        reader = [i % len(agents) for i in range(len(pages))]
        keys = [BlockKey(bytes([p]) * 32) for p in pages]
        plan = EnginePlan(PlanId(1), "r", b"n" * 32, keys, agents, reader, 60.0)
        behind = RUNNING if isinstance(self.deliveries.workers, LateWorker) else PASSED
        return self.deliveries.start(plan, 0, HostPages(torch.tensor(pages), 1), behind)


def step(ranks: list[Rank]) -> None:
    """SGLang's broadcast of requests."""
    travelling = pickle.dumps([*ranks[0].group.take(), "request"])
    for rank in ranks:
        assert rank.group.arrived(pickle.loads(travelling)) == ["request"]


@examples(80)
@given(st.data())
def test_ranks_give_out_the_same_pages_whenever_transfers_end(data):
    ranks = [Rank(0, 3), Rank(1, 3), Rank(2, 3)]
    late = LateWorker()
    ranks[2].deliveries.workers = cast(Any, late)
    running: list[tuple[list[int], list[Delivery]]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["start", "free", "end", "away", "late", "step"])):
            case "start":
                agents = data.draw(st.sampled_from([["a"], ["a", "b"]]))
                taken = [rank.take(3) for rank in ranks]
                assert taken[0] == taken[1] == taken[2]
                if taken[0]:
                    started = [rank.start(taken[0], agents) for rank in ranks]
                    running.append((taken[0], started))
            case "free" if running:
                pages, started = running.pop(data.draw(st.integers(0, len(running) - 1)))
                for rank, delivery in zip(ranks, started, strict=True):
                    rank.deliveries.abandon(delivery)
                    rank.free(pages)
            case "end" if len(ranks[0].jobs):
                job = data.draw(st.sampled_from(sorted(ranks[0].jobs._open)))
                ranks[0].jobs.over(job, data.draw(st.sampled_from(["", "failed"])))
            case "away":
                ranks[0].links.reachable = not ranks[0].links.reachable
            case "late":
                late.run()
            case "step":
                step(ranks)
        free = [rank.holds.free_tokens for rank in ranks]
        assert free[0] == free[1] == free[2]
        unevictable = [rank.holds.unevictable_tokens for rank in ranks]
        assert unevictable[0] == unevictable[1] == unevictable[2]
        jobs = [sorted(rank.jobs._open) for rank in ranks]
        assert jobs[0] == jobs[1] == jobs[2]


def test_a_failure_is_known_at_once_and_pages_return_at_all_ranks_together():
    ranks = [Rank(0, 2), Rank(1, 2)]
    pages = [rank.take(2) for rank in ranks][0]
    deliveries = [rank.start(pages, ["a"]) for rank in ranks]
    for rank in ranks:
        rank.free(pages)
    (writer,) = deliveries[0].writers
    ranks[0].jobs.over(writer.job, "agent a died")
    assert deliveries[0].error == "agent a died"  # no forward waits for the broadcast
    assert ranks[0].told == [(writer.slot, writer.job)]
    assert [rank.holds.deferred_tokens for rank in ranks] == [2 * PAGE] * 2
    assert not ranks[0].holds.take_returned()
    step(ranks)
    assert [rank.holds.take_returned() for rank in ranks] == [pages, pages]
    assert deliveries[1].error == "agent a died"


def test_one_rank_needs_no_broadcast():
    alone = Rank(0, 1)
    delivery = alone.start(alone.take(2), ["a"])
    alone.jobs.over(delivery.writers[0].job)
    assert len(alone.jobs) == 0 and alone.group.take() == []
    assert alone.group.all_of([True, False]) == [True, False]
    assert alone.group.gather("x") == ["x"]


def test_a_variant_is_taken_between_two_steps_of_one_rank_as_well():
    applied: list[object] = []
    alone = RankGroup(0, 1, None, applied.append)
    alone.post(VariantTaken(2))
    assert applied == []
    assert alone.arrived(["request", *alone.take()]) == ["request"]
    assert applied == [VariantTaken(2)]


def test_the_leader_makes_other_boards_say_that_a_job_failed():
    memory = np.zeros(8, np.uint64)
    boards = [("h:1", int(memory.ctypes.data)), ("h:2", int(memory.ctypes.data) + 32)]
    written = []

    def write(session: str, source: int, target: int, length: int) -> int:
        written.append((session, length))
        memory[(target - memory.ctypes.data) // 8] = np.ctypeslib.as_array(
            (ctypes.c_uint64 * 1).from_address(source)
        )[0]
        return 0

    OtherBoards(boards, lambda address, length: None, write).fail(slot=BoardSlot(2), job=JobId(9))
    assert written == [("h:1", 8), ("h:2", 8)]
    assert memory.tolist() == [0, 0, 9 << 16 | 0xFFFF, 0, 0, 0, 9 << 16 | 0xFFFF, 0]


def test_events_travel_as_one_item_or_not_at_all():
    leader = RankGroup(0, 2, None, lambda event: None)
    assert leader.take() == []
    leader.post(EndPlan(PlanId(1), "a"))
    leader.post(EndPlan(PlanId(2), "b"))
    assert leader.take() == [Events([EndPlan(PlanId(1), "a"), EndPlan(PlanId(2), "b")])]
    assert leader.take() == []


def _agree(rank: int, port: int, results) -> None:
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=2)
    group = RankGroup(rank, 2, torch.distributed.group.WORLD, lambda event: None)
    flags = [True, rank == 0, False, rank == 1]
    results.put((rank, group.gather(rank * 10), group.all_of(flags), group.all_of([])))
    torch.distributed.barrier()


@pytest.mark.timeout(60)
@pytest.mark.slow
def test_only_what_holds_at_every_rank_is_agreed_on():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_agree, args=(r, port, results)) for r in range(2)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=50) for _ in processes)
    for process in processes:
        process.join(10)
    agreed = ([0, 10], [True, False, False, False], [])
    assert found == [(0, *agreed), (1, *agreed)]
