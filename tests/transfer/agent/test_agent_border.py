"""Whatever comes over its control socket: an agent refuses what cannot be, and serves on."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.block import BlockLayout
from common.ids import BoardSlot, Incarnation, JobId, PlanId
from common.messages.codec import PROTOCOL, MalformedMessage, Message, decode, encode
from common.messages.from_engines import (
    CancelJob,
    Deliver,
    KeepWitness,
    PullBlocks,
    RankMemory,
    RegisterEngine,
)
from common.messages.from_gateway import EnginePlan, ReadShare, ReleasePlan
from tests.examples import examples
from tests.transfer.agent.agent_process import FakeGateway
from tests.transfer.agent.fake_engine import LAYOUT, key_of, namespace
from tests.transfer.agent.test_agent import deliver, store
from transfer.agent.engines import BadRegistration, Engines, check_registration
from transfer.credits import CreditBoard

NOW_MS = 1_000_000_000_000
MEMORY_BYTES = 1 << 20
ADDRESSES = [[1 << 20, 1 << 21]] * LAYOUT.num_layers
HELLO = RegisterEngine(
    "p0", Incarnation(NOW_MS), namespace(), 1, [RankMemory("127.0.0.1:1", ADDRESSES, 64)], 64, 64
)
KEYS = [key_of(block) for block in range(3)]
MESSAGES: list[Message] = [
    HELLO,
    ReadShare(PlanId(1), KEYS, 5.0),
    ReleasePlan(PlanId(1)),
    Deliver(JobId(1), PlanId(1), KEYS, [1, 2, 3], BoardSlot(1), True, 1.0),
    PullBlocks(JobId(2), KEYS, [1, 2, 3], 1.0),
    CancelJob(JobId(1)),
    KeepWitness(bytes(32), bytes(64), True),
]
ODD = [-1, 0, 1, 1 << 31, 1 << 48, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, "", "x" * 300, None, True]
ODD += [0.5, float("nan"), float("inf"), [], [0], [[]], {}, b"", b"\xff" * 32, bytes(33)]


def changed(message: Message, noise: random.Random) -> bytes:
    """A message some of whose values are others, as deep as they lie."""

    def change(value: object) -> object:
        if noise.random() < 0.15:
            return noise.choice(ODD)
        if isinstance(value, dict):
            return {name: change(each) if name != "type" else each for name, each in value.items()}
        return [change(each) for each in value] if isinstance(value, list) else value

    plain = msgspec.msgpack.decode(encode(message)[len(PROTOCOL) :])
    return PROTOCOL + msgspec.msgpack.encode(change(plain))


def with_numbers(message: Message, **fields: int) -> bytes:
    plain = msgspec.msgpack.decode(encode(message)[len(PROTOCOL) :])
    return PROTOCOL + msgspec.msgpack.encode(plain | fields)


@given(st.binary(max_size=400), st.randoms(use_true_random=False))
@examples(100)
def test_no_frame_does_more_than_not_decode(noise, randomly):
    for frame in (noise, PROTOCOL + noise, changed(randomly.choice(MESSAGES), randomly)):
        try:
            decode(frame)
        except MalformedMessage as error:
            assert str(error)


@pytest.mark.parametrize("fields", [{"job": 1 << 48}, {"job": -1}, {"plan": 1 << 48}])
def test_a_number_of_more_than_48_bits_does_not_decode(fields):
    with pytest.raises(MalformedMessage):
        decode(with_numbers(MESSAGES[3], **fields))


@pytest.mark.slow
def test_a_job_that_cannot_be_fails_and_so_do_many_of_them(agent, gateway, start_engine):
    """More of them than there are workers."""
    engine = start_engine("d0")
    store(engine, 1, range(3))
    gateway.read(7, range(3))
    slots = [1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -1, 64]
    for job, slot in enumerate(slots, 100):
        deliver(engine, job, 7, range(3), range(10, 13), slot=slot)
        assert "board slot" in engine.wait_end(job).error
    for job, page in enumerate((64, 1 << 40, 1 << 63, -1), 200):
        deliver(engine, job, 7, range(1), [page])  # type: ignore[arg-type]
        assert "of 64 pages" in engine.wait_end(job).error
    deliver(engine, 300, 7, range(3), range(20, 23))
    assert engine.wait_end(300).error == ""


@pytest.mark.slow
def test_an_agent_serves_on_after_thousands_of_odd_messages(agent, gateway, start_engine):
    engine = start_engine("d0")
    store(engine, 1, range(3))
    other = FakeGateway(agent.control, "p0")
    other.send(HELLO)
    noise = random.Random(7)
    for _ in range(40):
        for client in (gateway, other):
            for _ in range(50):
                client.socket.send(changed(noise.choice(MESSAGES), noise))
            client.hello()
    other.close()
    store(engine, 70_000, range(10, 13))
    gateway.read(70_000, range(10, 13))
    deliver(engine, 70_001, 70_000, range(10, 13), range(20, 23))
    assert engine.wait_end(70_001).error == ""
    assert "Traceback" not in agent.log()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"incarnation": NOW_MS + 86_400_001}, "a day ahead"),
        ({"namespace": namespace(BlockLayout(4, 0, (4096,)))}, "BlockLayout"),
        ({"namespace": namespace(BlockLayout(4, 65535, (4,)))}, "BlockLayout"),
        ({"namespace": namespace(BlockLayout(0, 4, (4096, 2048)))}, "BlockLayout"),
        ({"namespace": namespace(BlockLayout(4, 4, (1 << 60, 4)))}, "bytes of DRAM"),
        ({"namespace": namespace(BlockLayout(4, 4, (-4096, 8192)))}, "shards"),
        ({"namespace": namespace(BlockLayout(4, 4, (4,) * 17))}, "shards"),
        ({"namespace": namespace(BlockLayout(4, 3, (4096, 2048)))}, "shape"),
        *(
            ({"namespace": namespace(BlockLayout(4, 4, (4096, 2048), absent=absent))}, "absent")
            for absent in (((), ()), ((1,),), ((), (4,)), ((), (2, 1)), ((1,), (1,)), ((), (1, 1)))
        ),
        ({"namespace": namespace(BlockLayout(4, 4, (8, 8), draft_layers=4))}, "draft"),
        ({"namespace": namespace(BlockLayout(4, 300, (8, 8), absent=((), (1,))))}, "shards"),
        ({"shards": 2}, "shards"),
        ({"ranks": [RankMemory("no port", ADDRESSES, 0)]}, "no memory of a peer"),
        ({"ranks": [RankMemory("h:1", [[(1 << 63) - 1, 0]] * 4, 0)]}, "no memory of a peer"),
        ({"ranks": [RankMemory("h:1", [[1], [1, 2], [1], [1]], 0)]}, "inhomogeneous"),
    ],
)
def test_a_registration_that_cannot_be_is_refused_before_it_changes_anything(change, words):
    check_registration(HELLO, NOW_MS, MEMORY_BYTES)
    odd = msgspec.structs.replace(HELLO, **change)
    with pytest.raises(BadRegistration, match=words):
        check_registration(odd, NOW_MS, MEMORY_BYTES)


def test_an_engine_whose_next_registration_is_refused_is_served_on():
    engines = Engines(CreditBoard(lambda address, length: None))
    engine, _ = engines.register(b"id", HELLO)
    for change in (
        {"ranks": HELLO.ranks * 2},
        {"shards": 2},
        {"incarnation": NOW_MS + 1, "shards": 2},
    ):
        with pytest.raises(BadRegistration):
            engines.register(b"other", msgspec.structs.replace(HELLO, **change))
    assert engine is not None and engines.find(b"id") is engine and engine.identity == b"id"
    assert engines.register(b"other", HELLO) == (engine, None)
    assert engines.find(b"id") is None and engines.find(b"other") is engine


@pytest.mark.slow
def test_the_first_registration_does_not_fix_an_odd_size_of_slots(agent, gateway, start_engine):
    odd = FakeGateway(agent.control, "p0")
    odd.send(msgspec.structs.replace(HELLO, namespace=namespace(BlockLayout(1, 0, (1,)))))
    odd.send(msgspec.structs.replace(HELLO, incarnation=Incarnation((1 << 48) - 1)))
    odd.hello()
    odd.close()
    store(start_engine("p0"), 1, range(2))


@pytest.mark.parametrize(
    ("agents", "reader", "fault"),
    [
        (["a"], [0, 0], ""),
        (["a"], [0], "1 readers for 2"),
        (["a"], [0, 1], "reader 1 of 1"),
    ],
)
def test_a_plan_says_what_is_wrong_with_it(agents, reader, fault):
    plan = EnginePlan(PlanId(1), "rid", bytes(32), KEYS[:2], agents, reader, 5.0)
    assert fault in plan.fault and bool(plan.fault) == bool(fault)
    with pytest.raises(MalformedMessage):
        decode(encode(msgspec.structs.replace(plan, reader=[-1, 0])))
