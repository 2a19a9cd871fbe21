"""Engines of several ranks: each block is stored once, and every rank gets its heads."""

from __future__ import annotations

import ctypes

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.block import BlockLayout
from common.ids import Incarnation
from common.messages.from_engines import RankMemory, RegisterEngine
from tests.examples import examples
from tests.samples import by_name
from tests.transfer.agent.fake_engine import LAYOUT, content_of, namespace
from tests.transfer.agent.test_agent import deliver, store
from transfer.agent.engines import BadRegistration, Engine
from transfer.agent.jobs.heads import OtherShards, Staging
from transfer.credits import CreditBoard

LAYERS = LAYOUT.num_layers


def in_shards(shards: int) -> BlockLayout:
    return msgspec.structs.replace(LAYOUT, shards=shards)


def shard_of(content: bytes, layout: BlockLayout, shards: int, shard: int) -> bytes:
    """What a rank holds of a block: by way of (token, byte of a token's heads)."""
    held = []
    for layer in range(layout.num_layers):
        for c, size in enumerate(layout.component_bytes):
            parts = []
            for part in range(layout.shards):
                mine = layout.shard
                start = part * mine.block_bytes + mine.layer_start(layer)
                start += sum(mine.component_bytes[:c])
                page = content[start : start + mine.component_bytes[c]]
                parts.append(np.frombuffer(page, np.uint8).reshape(layout.page_tokens, -1))
            tokens = np.concatenate(parts, axis=1)
            assert tokens.nbytes == size
            width = tokens.shape[1] // shards
            held.append(tokens[:, shard * width : (shard + 1) * width].tobytes())
    return b"".join(held)


@examples(60)
@given(st.data())
def test_any_even_split_is_cut_or_joined_to_any_other(data):
    few = data.draw(st.integers(1, 4))
    many = few * data.draw(st.integers(1, 4))
    source, target = data.draw(st.permutations([few, many]))
    tokens, heads = data.draw(st.integers(1, 4)), few * many
    sizes = tuple(
        tokens * heads * data.draw(st.integers(1, 3)) for _ in range(data.draw(st.integers(1, 2)))
    )
    layout = BlockLayout(tokens, data.draw(st.integers(1, 3)), sizes, source)
    blocks, slot_bytes = data.draw(st.integers(1, 5)), layout.block_bytes + 3
    dram = np.random.default_rng(blocks).integers(0, 256, (8, slot_bytes), np.uint8)
    slots = np.array(data.draw(st.permutations(range(8)))[:blocks])
    pages = np.array(data.draw(st.permutations(range(8)))[:blocks])
    shard = data.draw(st.integers(0, target - 1))
    mine = msgspec.structs.replace(layout, shards=target).shard
    buffers = np.tile([8 * size for size in mine.component_bytes], layout.num_layers)
    bases = (np.cumsum(buffers) - buffers).reshape(layout.num_layers, -1)
    device = np.zeros(8 * mine.block_bytes, np.uint8)
    registered: list[tuple[int, int]] = []
    staging = Staging(lambda *region: registered.append(region), max(sizes))
    ((address, length),) = registered
    host = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(address))
    given_blocks = OtherShards(dram, slots, pages, layout, target, shard)
    for layer in range(layout.num_layers):
        for local, remote, lengths in staging.ranges(given_blocks, bases, layer):
            for at, to, length in zip(local - address, remote, lengths, strict=True):
                device[to : to + length] = host[at : at + length]
    for slot, page in zip(slots, pages, strict=True):
        got = b"".join(
            device[base + page * size : base + page * size + size].tobytes()
            for layer in bases
            for base, size in zip(layer, mine.component_bytes, strict=True)
        )
        content = dram[slot, : layout.block_bytes].tobytes()
        assert got == shard_of(content, layout, target, shard)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [(2, 1), (1, 2), (2, 2), (2, 4), (4, 2)],
)
def test_blocks_of_one_tensor_parallel_size_serve_another(gateway, start_engine, stored, wanted):
    decode = start_engine("d0", layout=in_shards(stored), ranks=stored)
    prefill = start_engine("p0", layout=in_shards(wanted), ranks=wanted)
    store(decode, 1, range(10))
    assert gateway.read(7, range(10)).in_dram == [True] * 10
    deliver(prefill, 5, 7, range(10), range(20, 30), slot=3)
    assert prefill.wait_end(5).error == ""
    for rank in range(wanted):
        assert prefill.board(3, rank) == (5, LAYERS)
        for block in range(10):
            expected = shard_of(content_of(block), in_shards(stored), wanted, rank)
            assert prefill.page_bytes(20 + block, rank) == expected
    status = gateway.status(
        lambda s: 'dualpath:agent_delivered_bytes_total{engine="p0"}' in by_name(s.samples)
    )
    counters = by_name(status.samples)
    whole_bytes = 10 * LAYOUT.block_bytes
    assert counters['dualpath:agent_delivered_bytes_total{engine="p0"}'] == whole_bytes


@pytest.mark.slow
def test_the_shards_of_a_block_are_known_after_a_restart(agent, gateway, start_engine):
    engine = start_engine("d0", layout=in_shards(2), ranks=2)
    before = engine.wait_alive("a0")
    store(engine, 1, range(3))
    gateway.holdings(3, "ssd")
    agent.kill()
    agent.start()
    engine.wait_alive("a0", incarnation=before)
    other = start_engine("d1")
    assert gateway.read(9, range(3)).in_dram == [True] * 3
    deliver(other, 5, 9, range(3), range(20, 23))
    assert other.wait_end(5).error == ""
    for block in range(3):
        assert other.page_bytes(20 + block) == shard_of(content_of(block), in_shards(2), 1, 0)


@pytest.mark.slow
def test_replicated_kv_is_pulled_once_and_delivered_whole_to_each_rank(gateway, start_engine):
    # Of MLA, and of sparse attention some of whose layers have no index keys.
    sparse = BlockLayout(4, 4, (4096, 2048), absent=((), (1, 3)))
    engine = start_engine("d0", layout=sparse, ranks=2)
    store(engine, 1, range(4))
    assert gateway.read(7, range(4)).in_dram == [True] * 4
    deliver(engine, 5, 7, range(4), range(20, 24))
    assert engine.wait_end(5).error == ""
    for rank in range(2):
        assert [engine.page_bytes(20 + i, rank) for i in range(4)] == [
            content_of(i, sparse) for i in range(4)
        ]
    status = gateway.status(
        lambda s: 'dualpath:agent_delivered_bytes_total{engine="d0"}' in by_name(s.samples)
    )
    counters = by_name(status.samples)
    assert counters["dualpath:agent_pulled_bytes_total"] == 4 * sparse.block_bytes
    delivered = counters['dualpath:agent_delivered_bytes_total{engine="d0"}']
    assert delivered == 2 * 4 * sparse.block_bytes


@pytest.mark.slow
def test_blocks_whose_heads_do_not_divide_are_misses(gateway, start_engine):
    thirds = BlockLayout(4, 4, (4608, 2304), 3)
    engine = start_engine("d0", layout=thirds, ranks=3)
    store(engine, 1, range(2))
    assert gateway.read(7, range(2)).in_dram == [True] * 2
    start_engine("p0", layout=msgspec.structs.replace(thirds, shards=2), ranks=2)
    assert gateway.read(8, range(2)).in_dram == [False] * 2


@pytest.mark.slow
def test_a_failed_rank_ends_the_delivery_to_all(gateway, start_engine):
    engine = start_engine("d0", layout=in_shards(2), ranks=2)
    store(engine, 1, range(3))
    gateway.read(4, range(3))
    deliver(engine, 2, 4, range(3), range(10, 13), deadline_s=0.0)
    assert "deadline" in engine.wait_end(2, timeout_s=2).error
    assert [engine.board(0, rank)[0] for rank in range(2)] == [2, 2]


def test_registrations_that_split_no_heads_are_refused():
    addresses = [[0, 0]] * LAYERS

    def hello(shards: int, ranks: int) -> RegisterEngine:
        return RegisterEngine(
            "e",
            Incarnation(1),
            namespace(),
            shards,
            [RankMemory("s:1", addresses, 0)] * ranks,
            pages=64,
            board_slots=64,
        )

    credits = CreditBoard(lambda address, length: None)
    engine = Engine(b"", hello(2, 4), credits)
    assert [rank.shard for rank in engine.ranks] == [0, 0, 1, 1]
    first = engine.ranks[0].credit.address
    assert [rank.credit.address - first for rank in engine.ranks] == [0, 8, 16, 24]
    with pytest.raises(BadRegistration):
        engine.update(b"", hello(2, 2))
    for shards, ranks in ((0, 1), (2, 1), (1, 0), (3, 3)):
        with pytest.raises(BadRegistration):
            Engine(b"", hello(shards, ranks), credits)
