"""A slot that a transfer may still read or write is never given to another block."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest

from common.ids import BoardSlot, Incarnation, JobId, PlanId
from common.messages.from_agents import PullEnded
from common.messages.from_engines import Deliver, PullBlocks, RankMemory, RegisterEngine
from common.tracing.spans import Tracer
from storage.slot_pool import SlotPool
from storage.store_events import ShareSettled
from storage.tiered_store import TieredStore
from tests.transfer.agent.fake_engine import LAYOUT, key_of, namespace
from transfer.agent.engines import Engine, Engines
from transfer.agent.jobs import pull_jobs
from transfer.agent.jobs.deliver_jobs import DeliverJobs
from transfer.agent.jobs.reports import Reports
from transfer.agent.jobs.transfer import JobCancelled
from transfer.agent.jobs.transfer_queue import TransferQueue
from transfer.agent.metrics import AgentCounters
from transfer.agent.plan_spans import PlanSpans
from transfer.credits import CreditBoard
from transfer.mooncake import PeerSuspended, TransferFailed

SLOTS = 4


class StoppedQueue(TransferQueue):
    """Takes transfers and leaves their end to the test."""

    def __init__(self) -> None:
        self.transfers = []

    def submit(self, transfer) -> None:
        self.transfers.append(transfer)

    def cancel(self, transfer) -> None:
        transfer.ended(JobCancelled("cancelled"))


@pytest.fixture
def world():
    memory = memoryview(bytearray(SLOTS * LAYOUT.block_bytes))
    store = TieredStore(SlotPool(memory, LAYOUT.block_bytes), None, None)
    replies, queue = [], StoppedQueue()
    addresses = np.zeros((LAYOUT.num_layers, 2), int).tolist()
    credits = CreditBoard(lambda address, length: None)
    hello = RegisterEngine(
        "p0", Incarnation(1), namespace(), 1, [RankMemory("h:1", addresses, 0)], 64, 64
    )
    engine = Engine(b"id", hello, credits)

    def reply(engine, message) -> None:
        replies.append(message)

    spans = PlanSpans(Tracer(), "a0")
    reports = Reports(Incarnation(1), AgentCounters(), reply, lambda news: None)
    return SimpleNamespace(
        store=store,
        engine=engine,
        queue=queue,
        replies=replies,
        deliveries=DeliverJobs(queue, store.pool, 0, lambda plan: False, reports, spans),
        pulls=pull_jobs.PullJobs(queue, store, 0, "h", store.is_resident, reports),
    )


def fill(store, blocks: range) -> None:
    for key in store.reserve([key_of(block) for block in blocks]):
        store.commit(key)


def deliver(world, job: int, plan: int, blocks: range):
    keys = [key_of(block) for block in blocks]
    world.store.admit(plan, keys, time.monotonic() + 10, time.monotonic())
    world.store.poll(time.monotonic())
    world.deliveries.start(
        world.engine,
        Deliver(JobId(job), PlanId(plan), keys, list(blocks), BoardSlot(8), True, 10.0),
    )
    return world.queue.transfers[-1]


def test_the_end_of_its_plan_does_not_free_the_slots_of_a_delivery(world):
    fill(world.store, range(SLOTS))
    job = deliver(world, 1, 7, range(SLOTS))
    world.store.release(7)
    assert world.store.reserve([key_of(50)]) == {}
    job.ended(None)
    assert len(world.store.reserve([key_of(50)])) == 1
    assert world.replies[-1].error == ""


def test_a_delivery_that_cannot_even_be_made_is_answered_and_keeps_nothing(world):
    fill(world.store, range(SLOTS))
    deliver(world, 1, 6, range(1)).ended(None)
    world.engine.ranks = [SimpleNamespace()]
    deliver(world, 2, 7, range(SLOTS))
    assert world.replies[-1].job == 2 and world.replies[-1].error
    assert not world.engine.jobs
    for plan in (6, 7):
        world.store.release(plan)
    assert len(world.store.reserve([key_of(block) for block in range(50, 50 + SLOTS)])) == SLOTS


@pytest.mark.parametrize(
    ("error", "may_land"),
    [
        (TransferFailed("h:1", "write", -1), True),
        (JobCancelled("cancelled"), False),
        (PeerSuspended("h:1", 2.0), False),
    ],
)
def test_the_engine_is_told_whether_bytes_may_still_land(world, error, may_land):
    fill(world.store, range(1))
    deliver(world, 1, 7, range(1)).ended(error)
    (end,) = world.replies
    assert end.error and end.may_land == may_land
    assert world.engine.failures == may_land


def test_a_failed_pull_keeps_its_slots_until_a_fence_has_passed(world):
    keys = [key_of(block) for block in range(SLOTS)]
    world.pulls.start(world.engine, PullBlocks(JobId(1), keys, list(range(SLOTS)), 10.0))
    world.queue.transfers[-1].ended(TransferFailed("h:1", "read", -1))
    assert world.replies == [PullEnded(Incarnation(1), JobId(1), [False] * SLOTS)]
    assert world.pulls.quarantined_slots == SLOTS
    world.pulls.release_quarantine(lambda engine, passed: None)
    assert world.store.reserve([key_of(50)]) == {}
    world.pulls.release_quarantine(lambda engine, passed: passed())
    assert world.pulls.quarantined_slots == 0
    assert len(world.store.reserve([key_of(50)])) == 1


def test_no_share_waits_for_a_block_in_quarantine(world):
    keys, now = [key_of(block) for block in range(2)], time.monotonic()
    world.pulls.start(world.engine, PullBlocks(JobId(1), keys, [0, 1], 10.0))
    world.store.admit(PlanId(7), keys, now + 100, now)
    assert not world.store.poll(now)
    world.queue.transfers[-1].ended(TransferFailed("h:1", "read", -1))
    world.store.admit(PlanId(8), keys, now + 100, now)
    settled = [event for event in world.store.poll(now) if isinstance(event, ShareSettled)]
    assert [share.plan for share in settled] == [7, 8]
    assert [share.in_dram for share in settled] == [[False, False]] * 2
    world.pulls.release_quarantine(lambda engine, passed: passed())
    others = [key_of(block) for block in range(50, 50 + SLOTS)]
    assert len(world.store.reserve(others)) == SLOTS


def test_pulled_blocks_know_their_parents_and_their_tenant(world):
    keys = [key_of(block) for block in range(3)]
    world.store.reserve(keys[1:2])  # on its way by another pull
    world.pulls.start(
        world.engine, PullBlocks(JobId(1), keys, [0, 1, 2], 10.0, key_of(9), "ab" * 8)
    )
    world.queue.transfers[-1].ended(None)
    labels = [world.store.pool.label(key) for key in (keys[0], keys[2])]
    assert [label.parent for label in labels] == [key_of(9), keys[1]]
    assert {label.tenant for label in labels} == {"ab" * 8}
    assert {label.namespace_digest for label in labels} == {namespace().digest()}


@pytest.mark.parametrize(("shards", "read_from"), [(1, {"h:2"}), (2, {"away:1", "h:2"})])
def test_pulls_stay_on_the_node_where_they_can(world, shards, read_from):
    addresses = np.zeros((LAYOUT.num_layers, 2), int).tolist()
    ranks = [RankMemory(session, addresses, 0) for session in ("away:1", "h:2")]
    credits = CreditBoard(lambda address, length: None)
    engine = Engine(
        b"id",
        RegisterEngine("d0", Incarnation(1), namespace(), shards, ranks, 64, 64),
        credits,
    )
    world.pulls.start(engine, PullBlocks(JobId(1), [key_of(0)], [0], 10.0))
    assert {transfer.session_id for transfer in world.queue.transfers} == read_from


def test_a_pull_that_waits_for_another_ends_with_it(world):
    keys = [key_of(block) for block in range(3)]
    world.pulls.start(world.engine, PullBlocks(JobId(1), keys[:2], [0, 1], 10.0))
    world.pulls.start(world.engine, PullBlocks(JobId(2), keys, [4, 5, 6], 10.0))
    first, second = world.queue.transfers
    assert second.groups[0].places.tolist() == [6]
    second.ended(None)
    assert not world.replies
    first.ended(JobCancelled("cancelled"))
    assert world.replies == [
        PullEnded(Incarnation(1), JobId(1), [False, False]),
        PullEnded(Incarnation(1), JobId(2), [False, False, True]),
    ]


def test_only_the_newest_incarnation_of_an_engine_is_known():
    engines = Engines(CreditBoard(lambda address, length: None))
    addresses = [[0, 0]] * LAYOUT.num_layers

    def hello(incarnation: int, session: str) -> RegisterEngine:
        ranks = [RankMemory(session, addresses, 0)]
        return RegisterEngine("p0", Incarnation(incarnation), namespace(), 1, ranks, 64, 64)

    old, _ = engines.register(b"a", hello(5, "h:1"))
    new, replaced = engines.register(b"b", hello(6, "h:2"))
    assert replaced is old and old.is_gone and not new.is_gone
    assert engines.find(b"a") is None and engines.find(b"b") is new
    assert engines.register(b"c", hello(5, "h:1")) == (None, None)
    again, replaced = engines.register(b"d", hello(6, "h:2"))
    assert again is new and replaced is None and new.identity == b"d"
