"""Objects of parts: pulled, kept and delivered as blocks are, each in its layer's batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common.block import BlockKey, BlockLayout, Part, part_key
from common.board_word import FAILED
from common.ids import BoardSlot, Incarnation, JobId, PlanId
from common.messages.from_agents import JobEnded, PullEnded, ShareRead
from common.messages.from_engines import (
    Deliver,
    PartPlaces,
    PullBlocks,
    RankMemory,
    RegisterEngine,
)
from common.messages.from_gateway import ReadShare, ReleasePlan, Subscribe
from storage import cli
from storage.block_format import HEADER_BYTES
from tests.storage.ssd.slab_files import flip, place_of
from tests.transfer.agent.agent_process import FakeGateway, running_agent
from tests.transfer.agent.fake_engine import FakeEngine, WithParts, content_of, key_of, namespace
from tests.transfer.agent.test_ranks import shard_of
from transfer.agent.engines import BadRegistration, Engines, check_registration
from transfer.credits import CreditBoard

LAYERS = 5
KV = BlockLayout(4, LAYERS, (4096, 2048), absent=((1, 3, 4), (1, 3, 4)))
WINDOW = Part("window", BlockLayout(4, LAYERS, (2048, 1024), absent=((0, 2, 4), (0, 2, 4))), 2)
STATE = Part("state", BlockLayout(4, LAYERS, (1001, 77), absent=((0, 1, 2, 4), (0, 2, 3, 4))), 1)
"""Layer 4 has nothing at all; layer 1 a window and a component of the state."""
PARTS = (WINDOW, STATE)
SIZES = [KV.block_bytes, WINDOW.layout.block_bytes, STATE.layout.block_bytes]


def places(blocks: range, first: int) -> PartPlaces:
    return PartPlaces([key_of(block) for block in blocks], [first + i for i in range(len(blocks))])


def share(blocks: range, windows: range, states: range) -> dict[BlockKey, int]:
    """Keys and sizes of what a plan reads."""
    sizes = {key_of(block): SIZES[0] for block in blocks}
    sizes |= {part_key("window", key_of(block)): SIZES[1] for block in windows}
    return sizes | {part_key("state", key_of(block)): SIZES[2] for block in states}


def store(engine: FakeEngine, job: int, blocks: range, windows: range, states: range) -> None:
    """Fill pages and places, and have the agent take them: all but the state with the blocks."""
    engine.fill_all(blocks, blocks.start)
    for part, numbers in enumerate((windows, states)):
        for i, block in enumerate(numbers):
            engine.fill_part(part, 40 + i, block)
    keys, none = [key_of(block) for block in blocks], PartPlaces([], [])
    pull = PullBlocks(JobId(job), keys, list(blocks), 10.0, parts=[places(windows, 40), none])
    engine.send("a0", pull)
    ended = engine.wait_end(job)
    assert isinstance(ended, PullEnded) and ended.held == [True] * (len(blocks) + len(windows))
    snapshot = PullBlocks(JobId(job + 1), [], [], 10.0, parts=[none, places(states, 40)])
    engine.send("a0", snapshot)
    ended = engine.wait_end(job + 1)
    assert isinstance(ended, PullEnded) and ended.held == [True] * len(states)


def deliver(
    engine: FakeEngine, job: int, plan: int, blocks: range, windows: range, states: range
) -> JobEnded:
    keys = [key_of(block) for block in blocks]
    pages, parts = list(range(20, 20 + len(blocks))), [places(windows, 3), places(states, 9)]
    engine.send(
        "a0",
        Deliver(JobId(job), PlanId(plan), keys, pages, BoardSlot(3), True, 10.0, parts=parts),
    )
    ended = engine.wait_end(job)
    assert isinstance(ended, JobEnded)
    return ended


def assert_delivered(engine: FakeEngine, blocks: range, windows: range, states: range) -> None:
    for i, block in enumerate(blocks):
        assert engine.page_bytes(20 + i) == content_of(block, KV)
    for i, block in enumerate(windows):
        assert engine.page_bytes(3 + i, pool=1) == content_of(block, WINDOW.layout, "window")
    for i, block in enumerate(states):
        assert engine.page_bytes(9 + i, pool=2) == content_of(block, STATE.layout, "state")
    assert not any(engine.page_bytes(3 + len(windows), pool=1)), "a place that nobody named"


def parts_listed(capsys: pytest.CaptureFixture[str], where: str) -> dict[str, int]:
    """How many objects ``storage.cli ls`` names of each part; each has its block for a parent."""
    assert cli.main(["ls", where, "--json"]) == 0
    names: dict[str, int] = {}
    for line in json.loads(capsys.readouterr().out):
        name = line["part"]
        names[name] = names.get(name, 0) + 1
        assert line["payload_bytes"] == SIZES[["", "window", "state"].index(name)]
        if name and line["parent"]:  # of remote blocks it is in the header alone
            assert line["key"] == part_key(name, BlockKey(bytes.fromhex(line["parent"]))).hex()
    return names


@pytest.mark.parametrize("below", ["ssd", "remote"])
def test_parts_outlive_their_agent_and_a_corrupt_one_is_a_miss(
    tmp_path: Path, below: str, capsys: pytest.CaptureFixture[str]
) -> None:
    remote = tmp_path / "remote"
    tiers: dict[str, Any] = {}
    if below == "remote":
        tiers = {"ssd_dirs": [], "remote_url": remote.as_uri()}
    engines: list[FakeEngine] = []
    with running_agent(tmp_path, **tiers) as agent:
        gateway = FakeGateway(agent.control)
        gateway.send(Subscribe())
        try:
            decode = FakeEngine("d0", {"a0": agent.control}, layout=WithParts(KV, PARTS))
            engines.append(decode)
            before = decode.wait_alive("a0")
            store(decode, 1, range(4), range(2, 4), range(3, 4))
            assert len(gateway.holdings(7, below)) == 7
            agent.kill()
            folder = tmp_path / "ssd" if below == "ssd" else remote
            where = str(folder) if below == "ssd" else remote.as_uri()
            assert parts_listed(capsys, where) == {"": 4, "window": 2, "state": 1}

            agent.start()
            decode.wait_alive("a0", before)
            prefill = FakeEngine("p0", {"a0": agent.control}, layout=WithParts(KV, PARTS))
            engines.append(prefill)
            prefill.wait_alive("a0")
            wanted = share(range(4), range(2, 4), range(3, 4))
            read = gateway.read_all(7, wanted)
            assert read.in_dram == [True] * 7
            assert read.read_bytes == {below: sum(wanted.values())}, "its own bytes of each"
            assert deliver(prefill, 5, 7, range(4), range(2, 4), range(3, 4)).error == ""
            assert prefill.board(3) == (5, LAYERS)
            assert_delivered(prefill, range(4), range(2, 4), range(3, 4))
            if below == "ssd":
                agent.kill()
                place = place_of(folder, part_key("window", key_of(3)))
                flip(place.path, place.offset + HEADER_BYTES + 100)
                agent.start()
                prefill.wait_alive("a0", before + 1)
                read = gateway.read_all(8, wanted)
                assert read.in_dram == [True] * 5 + [False, True]
                ended = deliver(prefill, 6, 8, range(4), range(2, 4), range(3, 4))
                assert "1 of 7 blocks are not in DRAM" in ended.error
                assert prefill.board(3) == (6, FAILED)
        finally:
            gateway.close()
            for engine in engines:
                engine.kill()


@pytest.mark.parametrize(("stored", "wanted"), [(2, 2), (2, 1), (1, 2)])
def test_a_window_is_split_by_heads_as_its_blocks_are(gateway, start_engine, stored, wanted):
    def split(layout: BlockLayout, shards: int) -> BlockLayout:
        return msgspec.structs.replace(layout, shards=shards)

    plain = BlockLayout(4, 4, (4096, 2048))
    window = Part("window", BlockLayout(4, 4, (2048, 1024)), 2)
    decode = start_engine("d0", layout=WithParts(split(plain, stored), [window]), ranks=stored)
    prefill = start_engine("p0", layout=WithParts(split(plain, wanted), [window]), ranks=wanted)
    decode.fill_all(range(2), 0)
    decode.fill_part(0, 40, 1)
    keys, last = [key_of(0), key_of(1)], [key_of(1)]
    decode.send("a0", PullBlocks(JobId(1), keys, [0, 1], 10.0, parts=[PartPlaces(last, [40])]))
    assert decode.wait_end(1).held == [True] * 3
    sizes = dict.fromkeys(keys, plain.block_bytes)
    sizes[part_key("window", last[0])] = window.layout.block_bytes
    assert gateway.read_all(7, sizes).in_dram == [True] * 3
    parts = [PartPlaces(last, [11])]
    prefill.send(
        "a0", Deliver(JobId(5), PlanId(7), keys, [20, 21], BoardSlot(3), True, 10.0, parts=parts)
    )
    assert prefill.wait_end(5).error == ""
    for rank in range(wanted):
        for page, content, layout, pool in (
            (21, content_of(1, plain), plain, 0),
            (11, content_of(1, window.layout, "window"), window.layout, 1),
        ):
            held = prefill.page_bytes(page, rank, pool)
            assert held == shard_of(content, split(layout, stored), wanted, rank)


def test_jobs_that_name_no_such_places_touch_nothing(gateway, start_engine):
    engine = start_engine("d0", layout=WithParts(KV, PARTS))
    store(engine, 1, range(4), range(2, 4), range(3, 4))
    keys, none = [key_of(0)], PartPlaces([], [])
    for job, parts in (
        (11, [places(range(2, 4), 63), none]),  # one beyond the pool
        (12, [places(range(2, 4), -1), none]),
        (13, [PartPlaces(keys, [1, 2]), none]),
        (14, [places(range(2, 4), 0)]),  # of one part of two
        (15, [none, none, none]),
    ):
        engine.send("a0", PullBlocks(JobId(job), keys, [0], 10.0, parts=parts))
        named = sum(len(part.keys) for part in parts)
        assert engine.wait_end(job).held == [True] + [False] * named
        deadline, slot = 10.0, BoardSlot(job)
        engine.send(
            "a0", Deliver(JobId(10 * job), PlanId(1), keys, [0], slot, True, deadline, parts=parts)
        )
        assert "part" in (error := engine.wait_end(10 * job).error) or "place" in error
        assert engine.board(job) == (10 * job, FAILED)


def test_a_plan_of_blocks_alone_does_not_keep_their_window(gateway, start_engine):
    """A delivery gets what its plan has pinned, and nothing else."""
    engine = start_engine("d0", layout=WithParts(KV, PARTS))
    store(engine, 1, range(4), range(2, 4), range(3, 4))
    assert gateway.read_all(7, share(range(4), range(0), range(0))).in_dram == [True] * 4
    assert "3 of 7" in deliver(engine, 5, 7, range(4), range(2, 4), range(3, 4)).error
    gateway.send(ReleasePlan(PlanId(7)))


@pytest.mark.parametrize(("is_branch", "gone"), [(False, 1), (True, 0)])
def test_a_snapshot_goes_before_older_ones_once_one_of_its_path_replaces_it(
    tmp_path: Path, is_branch: bool, gone: int
) -> None:
    """But where prompts part, as the engine has said, and a plan has come back."""
    with running_agent(tmp_path, ssd_dirs=[], dram_bytes=4 * SIZES[0]) as agent:
        gateway = FakeGateway(agent.control)
        engine = FakeEngine("p0", {"a0": agent.control}, layout=WithParts(KV, PARTS))
        try:
            engine.wait_alive("a0")

            def leave(block: int, replaces: Sequence[int] = (), is_branch: bool = False) -> None:
                engine.fill_part(1, 40, block)
                parts = [PartPlaces([], []), PartPlaces([key_of(block)], [40])]
                older = [key_of(each) for each in replaces]
                pull = PullBlocks(JobId(block + 1), [], [], 10.0, parts=parts)
                pull = msgspec.structs.replace(pull, replaces=older, is_branch=is_branch)
                engine.send("a0", pull)
                ended = engine.wait_end(block + 1)
                assert isinstance(ended, PullEnded) and ended.held == [True]

            leave(0)
            leave(1, is_branch=is_branch)
            used = share(range(0), range(0), range(1, 2))
            assert gateway.read_all(7, used).in_dram == [True]
            gateway.send(ReleasePlan(PlanId(7)))
            leave(2, replaces=[5, 1])
            leave(3)
            leave(4)
            states = share(range(0), range(0), range(5))
            assert gateway.read_all(8, states).in_dram == [n != gone for n in range(5)]
        finally:
            gateway.close()
            engine.kill()


@pytest.mark.parametrize("size", [0, max(SIZES) + 1])
def test_a_share_of_sizes_that_nothing_has_is_a_miss(gateway, start_engine, size):
    engine = start_engine("d0", layout=WithParts(KV, PARTS))
    store(engine, 1, range(4), range(2, 4), range(3, 4))
    wanted = share(range(4), range(0), range(0)) | {part_key("window", key_of(3)): size}
    assert gateway.read_all(7, wanted).in_dram == [False] * 5
    gateway.send(ReadShare(PlanId(8), list(wanted), 10.0, sizes=[SIZES[0]]))
    assert gateway.wait(ShareRead, lambda share: share.plan == 8).in_dram == [False] * 5


def hello(**changes) -> RegisterEngine:
    fields = {
        "engine": "d0",
        "incarnation": Incarnation(1),
        "namespace": namespace(KV, PARTS),
        "shards": 1,
        "ranks": [RankMemory("h:1", [[0, 0]] * LAYERS, 0, part_addresses=[[[0, 0]] * LAYERS] * 2)],
        "pages": 64,
        "board_slots": 64,
        "part_places": [64, 64],
    }
    return RegisterEngine(**{**fields, **changes})


TWICE = (WINDOW, WINDOW)
NAMELESS = (WINDOW, msgspec.structs.replace(STATE, name=""))
FEWER_LAYERS = (WINDOW, msgspec.structs.replace(STATE, layout=BlockLayout(4, 2, (8,))))
NO_SPAN = (msgspec.structs.replace(WINDOW, span_pages=0), STATE)
IMPOSSIBLE = (TWICE, NAMELESS, FEWER_LAYERS, NO_SPAN)


@pytest.mark.parametrize(
    "changes",
    [
        {"part_places": [64]},
        {"namespace": namespace(KV, [WINDOW])},
        {"namespace": namespace(KV)},
        *({"namespace": namespace(KV, parts)} for parts in IMPOSSIBLE),
        {"ranks": [RankMemory("h:1", [[0, 0]] * LAYERS, 0)]},
        {"ranks": [RankMemory("h:1", [[0, 0]] * LAYERS, 0, part_addresses=[[[0, 0]]] * 2)]},
        {"shards": 2, "ranks": hello().ranks * 2},
    ],
)
def test_registrations_whose_parts_cannot_be_are_refused(changes):
    check_registration(hello(), 1.0, 1 << 20)
    engines = Engines(CreditBoard(lambda address, length: None))
    engines.register(b"id", hello())
    with pytest.raises(BadRegistration):
        check_registration(hello(**changes), 1.0, 1 << 20)
    with pytest.raises(BadRegistration):
        engines.register(b"id", hello(**changes))
