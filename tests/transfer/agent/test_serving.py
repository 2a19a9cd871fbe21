"""The agent's two states, without processes: what each answers, and how one follows the other."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from common.block import BlockLayout
from common.ids import NO_JOB, BoardSlot, Incarnation, JobId, PlanId
from common.messages import (
    CancelJob,
    Deliver,
    MalformedMessage,
    Message,
    PullBlocks,
    RankMemory,
    ReadShare,
    RegisterEngine,
    ShareRead,
    UnknownEngine,
)
from storage.store_events import StoreStats
from tests.transfer.agent.fake_engine import LAYOUT, key_of, namespace
from transfer.agent.serving import Serving, Unserved
from transfer.credits import CreditBoard

SLOTS = 4
NOW = Incarnation(9)


class World:
    """An agent's resources, of which the transfers go nowhere."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, Message]] = []
        credits = CreditBoard(lambda address, length: None)
        self.resources = cast(
            Any,
            SimpleNamespace(
                config=SimpleNamespace(
                    host="h",
                    experiment=SimpleNamespace(dram_keep=True),
                    write_policy="everywhere",
                    promotion_policy="always",
                ),
                incarnation=NOW,
                counters=None,
                socket=SimpleNamespace(send=self.send),
                announcer=SimpleNamespace(note=lambda holding: None, tell=lambda message: None),
                memory=SimpleNamespace(
                    address=0, view=memoryview(bytearray(SLOTS * LAYOUT.block_bytes))
                ),
                peer=SimpleNamespace(forgive=lambda session: None, meet=lambda session, at: None),
                credits=credits,
                ssd=None,
                remote=None,
                tiers=[],
                deliver_queue=SimpleNamespace(submit=lambda transfer: None),
                pull_queue=SimpleNamespace(submit=lambda transfer: None),
            ),
        )

    def send(self, client: bytes, message: Message) -> bool:
        self.sent.append((client, message))
        return True


@pytest.fixture
def world() -> World:
    return World()


def hello(layout: BlockLayout = LAYOUT, addresses: Sequence[object] = ()) -> RegisterEngine:
    if not addresses:
        addresses = np.zeros((layout.num_layers, len(layout.component_bytes)), int).tolist()
    ranks = [RankMemory("h:1", cast(Any, addresses), 0)]
    return RegisterEngine("p0", NOW, namespace(layout), 1, ranks)


JOBS = (
    Deliver(JobId(5), PlanId(1), [key_of(1)], [0], BoardSlot(0), True, 10.0),
    PullBlocks(JobId(5), [key_of(1)], [0], 10.0),
)


def test_before_the_first_engine_every_block_is_a_miss_and_every_client_a_stranger(world):
    state = Unserved(world.resources)
    state.read_share(b"g", ReadShare(PlanId(1), [key_of(1), key_of(2)], 10.0))
    assert world.sent == [(b"g", ShareRead(PlanId(1), [False, False], {}, 0.0, 0.0))]
    for job in JOBS:
        state.job(b"e", job)
        assert world.sent[-1] == (b"e", UnknownEngine(NOW, JobId(5)))
    state.job(b"e", CancelJob(JobId(5)))
    assert world.sent[-1] == (b"e", UnknownEngine(NOW, NO_JOB))
    state.release(PlanId(1))
    state.heard(b"e")
    state.poll()
    state.release_quarantine()
    assert list(state.holdings()) == [] and state.credit_address(b"e") == 0
    assert msgspec.to_builtins(state.stats()) == msgspec.to_builtins(StoreStats())
    assert (state.landing_jobs, state.quarantined_slots) == (0, 0)


def test_an_engine_whose_blocks_do_not_fit_leaves_the_agent_unserved(world):
    state = Unserved(world.resources)
    huge = hello(BlockLayout(4, 4, (1 << 20, 1 << 20)))
    assert state.opened_for(huge) is state
    state.register(b"e", huge)
    assert state.credit_address(b"e") == 0


def test_the_first_engine_opens_the_store_for_good(world):
    state = Unserved(world.resources).opened_for(hello())
    assert isinstance(state, Serving)
    state.register(b"e", hello())
    assert state.credit_address(b"e") > 0 and state.credit_address(b"g") == 0
    assert state.opened_for(hello(BlockLayout(4, 4, (8192, 8192)))) is state
    state.job(b"g", JOBS[0])
    assert world.sent == [(b"g", UnknownEngine(NOW, JobId(5)))]
    assert state.stats().slots == SLOTS


def test_a_registration_that_makes_no_sense_leaves_the_store_open(world):
    state = Unserved(world.resources).opened_for(hello())
    with pytest.raises(MalformedMessage):
        state.register(b"e", hello(addresses=[[1]]))
    assert isinstance(state, Serving) and state.credit_address(b"e") == 0
