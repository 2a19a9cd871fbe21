"""States of recurrent layers, on SGLang's own pool and allocator of slots, which are hooked as in
an engine."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import torch

from common.block import part_key
from common.ids import JobId
from common.messages.from_engines import PullBlocks
from engine import runtime
from engine.sglang.kv_pool import memory_of
from engine.sglang.pool_hooks import poison_pool
from engine.sglang.states import slots
from engine.sglang.states.pool import (
    SPARES,
    StateCopies,
    StateSlots,
    spares_of,
    state_parts,
    types_of,
    unstored_because,
)
from engine.streams import Streams
from engine.transfers.page_holds import PageHolds
from engine.transfers.snapshots import Snapshots
from tests.engine.parts import NAMESPACE, PAGE, Parts, Request, keys_of
from tests.engine.streams.device import Device, Workers

SLOTS, LAYERS, RECURRENT = 6, 5, [0, 1, 3]
CONV_BYTES, TEMPORAL_BYTES = 24 * 3 * 4, 2 * 8 * 16 * 4


@pytest.fixture(scope="module", autouse=True)
def _cpu_platform():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_PLATFORM", "dualpath_cpu")
        yield


def new_pool(**changes: Any) -> Any:
    from sglang.srt.configs.mamba_utils import (
        Mamba2CacheParams,
        Mamba2StateDType,
        Mamba2StateShape,
    )
    from sglang.srt.mem_cache.memory_pool import MambaPool

    shape = Mamba2StateShape(
        conv=[(24, 3)],
        temporal=(2, 8, 16),
        intermediate_size=16,
        conv_dim=24,
        ssm_state_size=16,
        num_heads=2,
        head_dim=8,
        state_size=16,
        conv_kernel=4,
    )
    types = Mamba2StateDType(conv=torch.float32, temporal=torch.float32)
    pool = MambaPool.__new__(MambaPool)
    slots.around_pool(
        MambaPool.__init__,
        pool,
        size=SLOTS,
        spec_state_size=2,
        cache_params=Mamba2CacheParams(shape=shape, dtype=types, layers=RECURRENT),
        mamba_layer_ids=RECURRENT,
        device="cpu",
        **changes,
    )
    return pool


@pytest.fixture
def pool() -> Any:
    return new_pool()


def hybrid_pool(states: Any) -> Any:
    from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool

    return HybridLinearKVPool(
        size=8 * PAGE,
        dtype=torch.float32,
        page_size=PAGE,
        head_num=2,
        head_dim=8,
        full_attention_layer_ids=[1, 4],
        device="cpu",
        mamba_pool=states,
    )


@pytest.mark.parametrize(("block_bytes", "names"), [(1, 3), (2, 2), (100, 1)])
def test_a_state_is_where_the_parts_say_and_none_is_larger_than_a_block(pool, block_bytes, names):
    state_bytes = CONV_BYTES + TEMPORAL_BYTES
    parts = state_parts(pool, LAYERS, PAGE, block_bytes * state_bytes)
    numbers = [str(n) for n in range(names)] if names > 1 else [""]
    assert [each.part.name for each in parts] == ["state" + number for number in numbers]
    assert {each.part.kind for each in parts} == {"state"}
    assert sum(each.part.layout.block_bytes for each in parts) == 3 * state_bytes
    assert max(each.part.layout.block_bytes for each in parts) <= max(1, block_bytes) * state_bytes
    for at, layer in enumerate(RECURRENT):
        pool.mamba_cache.conv[0][at, 2] = layer + 1
        pool.mamba_cache.temporal[at, 2] = -layer - 1
        (part,) = [each for each in parts if any(each.part.layout.sizes(layer))]
        for buffer, size, number in ((0, CONV_BYTES, layer + 1), (1, TEMPORAL_BYTES, -layer - 1)):
            seen = ctypes.string_at(part.addresses[layer][buffer] + 2 * size, size)
            assert seen == torch.full((size // 4,), float(number)).numpy().tobytes()
    assert all(not any(each.part.layout.sizes(2)) for each in parts)


def test_layers_with_kv_and_recurrent_ones_are_mapped_by_layers_of_the_model(pool):
    memory = memory_of(hybrid_pool(pool), kv_heads=2)
    assert memory.layout.num_layers == LAYERS and memory.kv_layers == [1, 4]
    assert [each.part.layout.num_layers for each in memory.parts] == [LAYERS] * len(memory.parts)
    assert types_of(pool) == "float32 float32"


def test_what_cannot_be_stored_is_named(pool):
    table = SimpleNamespace(
        mamba_pool=pool,
        mamba_ckpt_pool=None,
        enable_mamba_extra_buffer=True,
        enable_mamba_extra_buffer_lazy=False,
    )
    assert unstored_because(table) == ""
    for name, value, why in (
        ("mamba_ckpt_pool", object(), "8 bits"),
        ("enable_mamba_extra_buffer", False, "no snapshots"),
        ("enable_mamba_extra_buffer_lazy", True, "no snapshots"),
        ("mamba_pool", type("TomorrowsPool", (), vars(pool))(), "TomorrowsPool"),
    ):
        assert why in unstored_because(SimpleNamespace(**vars(table) | {name: value}))


# ---- slots under transfers ----------------------------------------------------------------


@pytest.fixture
def world(pool, monkeypatch) -> SimpleNamespace:
    """An engine, a table of requests with its allocator of slots, and holds on them."""
    from sglang.srt.mem_cache.allocator.mamba import MambaSlotAllocator

    class Hooked(MambaSlotAllocator):
        def free(self, free_index: torch.Tensor) -> None:
            slots.around_free(super().free.__func__, self, free_index)

        def available_size(self) -> int:
            slots.before_available_size(self)
            return super().available_size()

        def clear(self) -> None:
            super().clear()
            slots.after_clear(None, self)

    monkeypatch.setattr(runtime, "_runtime", None)
    allocator = Hooked(SLOTS, "cpu")
    kv_pages = SimpleNamespace(page_size=PAGE, get_kvcache=lambda: hybrid_pool(pool))
    of_slots = PageHolds(StateSlots(allocator, pool))
    engine = SimpleNamespace(holds=PageHolds(kv_pages, [of_slots, of_slots]))
    monkeypatch.setattr(runtime, "_runtime", engine)
    return SimpleNamespace(allocator=allocator, pool=pool, engine=engine, holds=engine.holds)


def test_a_slot_under_a_transfer_is_not_given_out_again(world):
    mine = world.allocator.alloc(2)
    world.holds.hold(JobId(1), [], [[int(mine[0])], [int(mine[0])]])
    world.allocator.free(mine)
    assert world.allocator.available_size() == SLOTS - 1
    observer = SimpleNamespace(req_to_token_pool=SimpleNamespace(mamba_allocator=world.allocator))
    assert slots.after_session_held(0, observer) == 1
    world.allocator.clear()
    assert world.allocator.available_size() == SLOTS - 1
    world.holds.release(JobId(1))
    assert world.allocator.available_size() == SLOTS
    assert sorted(world.allocator.free_slots.tolist()) == list(range(1, SLOTS + 1))
    assert slots.after_session_held(0, observer) == 0


def test_free_slots_are_poisoned_and_neither_held_nor_spare_ones(world):
    buffers = [*world.pool.mamba_cache.conv, world.pool.mamba_cache.temporal]
    for buffer in buffers:
        buffer.fill_(7)
    world.holds.hold(JobId(1), [], [[2], [2]])
    allocator = world.engine.holds.allocator
    poison_pool(
        world.engine, SimpleNamespace(token_to_kv_pool_allocator=allocator, draft_worker=None)
    )
    kept = {2, *spares_of(world.pool)}
    for buffer in buffers:
        untouched = {n for n in range(buffer.shape[1]) if (buffer[:, n] == 7).all()}
        assert untouched == kept
        assert all((buffer[layer] != 7).any() for layer in range(len(RECURRENT)))


def test_spare_slots_are_none_of_sglangs(pool, world):
    assert world.pool.size == SLOTS
    assert world.pool.mamba_cache.temporal.shape[1] == SLOTS + 1 + SPARES
    given_out = set(world.allocator.alloc(SLOTS).tolist())
    assert world.allocator.alloc(1) is None and not given_out & set(spares_of(world.pool))


# ---- loads --------------------------------------------------------------------------------


@pytest.fixture
def linker(pool, monkeypatch) -> Any:
    """Of a prefill engine, with SGLang's table of requests."""
    from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool

    from engine.sglang.prefill.linker import PrefillLinker

    table: Any = HybridReqToTokenPool.__new__(HybridReqToTokenPool)
    table.mamba_pool, table.layer_transfer_counter, table.start_layer = pool, None, 0
    table.mamba_map = {layer: at for at, layer in enumerate(RECURRENT)}
    monkeypatch.setattr(runtime, "_runtime", None)
    params = SimpleNamespace(
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: "kv"),
        req_to_token_pool=table,
        page_size=PAGE,
    )
    return PrefillLinker(None, params, components=set()), table


def test_a_recurrent_layer_waits_for_its_state_and_a_copy_for_those_of_all(linker):
    gate, table = linker[0].layer_done_counter, linker[1]
    waited: list[int] = []
    gate.set_consumer(gate.add(cast(Any, SimpleNamespace(wait_layer=waited.append))))
    table.mamba2_layer_index(1)
    table.copy_mamba_state(torch.tensor([1]), torch.tensor([2]))
    assert waited == [1, 3]
    gate.set_consumer(-1)
    table.copy_mamba_state(torch.tensor([1]), torch.tensor([2]))
    assert waited == [1, 3]


def test_all_parts_of_a_state_are_loaded_into_one_slot(pool, linker, monkeypatch):
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

    queued: list[tuple[Any, ...]] = []
    parts = tuple(each.part for each in state_parts(pool, LAYERS, PAGE, 1))
    engine = SimpleNamespace(
        streams=Streams(),
        weights=SimpleNamespace(namespace=msgspec.structs.replace(NAMESPACE, parts=parts)),
        hit_loads=SimpleNamespace(queue=lambda *load: queued.append(load)),
    )
    monkeypatch.setattr(runtime, "_runtime", engine)
    rows = torch.arange(2 * PAGE, 5 * PAGE)
    transfers = [
        PoolTransfer(name=PoolName.KV, device_indices=rows),
        PoolTransfer(name=PoolName.MAMBA, device_indices=torch.tensor([5])),
    ]
    assert linker[0].load("r", transfers)
    ((rid, pages, of_parts),) = queued
    assert rid == "r" and pages.get().tolist() == [2, 3, 4]
    assert [each.get().tolist() for each in of_parts] == [[5]] * len(parts)


# ---- snapshots ----------------------------------------------------------------------------


class Leaving:
    """An engine whose snapshots leave, as its device comes to it."""

    def __init__(self, pool: Any, device: Device | None = None) -> None:
        parts = state_parts(pool, LAYERS, PAGE, 1)

        namespace = msgspec.structs.replace(NAMESPACE, parts=tuple(each.part for each in parts))
        self.parts = Parts("prefill", namespace=namespace)
        self.snapshots = Snapshots(
            self.parts.config,
            self.parts.plans,
            self.parts.jobs,
            self.parts.links,
            Streams(device, device.forward if device is not None else None),
            StateCopies(pool),
        )
        self.workers = Workers()
        self.snapshots.workers = cast(Any, self.workers)
        self.request = Request("r", list(range(10 * PAGE + 1)), cache_salt="tenant")

    def pulls(self) -> list[PullBlocks]:
        return [message for _, message in self.parts.links.of(PullBlocks)]


def test_a_snapshot_is_offered_under_the_key_of_its_block_and_its_copy_outlives_it(pool):
    engine = Leaving(pool)
    engine.parts.plan(engine.request, blocks=2)
    pool.mamba_cache.temporal[:, 3] = 5
    engine.snapshots.offer_prompt(engine.request, 4 * PAGE, torch.tensor([3]))
    pool.mamba_cache.temporal[:, 3] = 6
    (pull,) = engine.pulls()
    assert not pull.keys and not pull.pages and len(pull.tenant) == 16
    (spare,) = {place for part in pull.parts for place in part.places}
    assert spare in spares_of(pool) and (pool.mamba_cache.temporal[:, spare] == 5).all()
    key = keys_of(engine.request, engine.parts.weights.digest)[3]
    assert [part.keys for part in pull.parts] == [[key]] * 3
    assert part_key("state0", key) != part_key("state1", key)


def test_a_snapshot_replaces_those_of_the_prefix_that_its_plan_has_found(pool):
    engine = Leaving(pool)
    engine.parts.plan(engine.request, blocks=3)
    keys = keys_of(engine.request, engine.parts.weights.digest)
    for blocks, is_branch in ((5, False), (3, False), (2, False), (5, True)):
        engine.snapshots.offer_prompt(
            engine.request, blocks * PAGE, torch.tensor([1]), is_branch=is_branch
        )
    pulls = engine.pulls()
    assert [pull.replaces for pull in pulls] == [keys[:3], keys[:2], keys[:1], []]
    assert [pull.is_branch for pull in pulls] == [False, False, False, True]


def test_with_every_spare_slot_on_its_way_a_snapshot_is_skipped(pool):
    engine = Leaving(pool)
    engine.parts.plan(engine.request, blocks=2)
    for tokens in range(1, SPARES + 2):
        engine.snapshots.offer_prompt(engine.request, tokens * PAGE, torch.tensor([1]))
    assert len(engine.pulls()) == SPARES and engine.snapshots.skipped_total == 1
    engine.parts.jobs.over(engine.pulls()[0].job)
    engine.snapshots.offer_prompt(engine.request, PAGE, torch.tensor([1]))
    places = [pull.parts[0].places for pull in engine.pulls()]
    assert len(places) == SPARES + 1 and places[-1] == places[0]


def test_of_an_agent_that_is_away_the_slot_comes_back(pool):
    engine = Leaving(pool)
    engine.parts.plan(engine.request, blocks=2)
    engine.parts.links.reachable = False
    for _ in range(SPARES + 1):
        engine.snapshots.offer_prompt(engine.request, PAGE, torch.tensor([1]))
    assert engine.snapshots.skipped_total == 0 and not engine.parts.jobs


def test_nothing_is_offered_of_a_prompt_of_other_weights_or_none_that_is_known(pool):
    engine = Leaving(pool)
    engine.snapshots.offer_prompt(engine.request, PAGE, torch.tensor([1]))
    engine.parts.plan(engine.request, blocks=2, namespace_digest=b"e" * 32)
    engine.snapshots.offer_prompt(engine.request, PAGE, torch.tensor([1]))
    assert not engine.pulls()


def test_an_agent_reads_what_the_forward_has_written(pool):
    device = Device()
    engine = Leaving(pool, device)
    engine.parts.plan(engine.request, blocks=2)
    with device.on(device.forward):
        device.launch(lambda: None)
    engine.snapshots.offer_prompt(engine.request, PAGE, torch.tensor([1]))
    assert not engine.pulls()
    engine.workers.run()
    assert len(engine.pulls()) == 1


def tracked(last: int | None, before: int | None, index: int = 1, slots_of: int = 2) -> Any:
    kv = SimpleNamespace(
        mamba_ping_pong_track_buffer=torch.arange(10, 10 + slots_of),
        mamba_last_track_idx=index,
        mamba_last_track_seqlen=last,
        mamba_prev_track_seqlen=before,
    )
    return SimpleNamespace(kv=kv)


@pytest.mark.parametrize(
    ("request_", "found"),
    [
        (tracked(64, None), (64, [11])),
        (tracked(None, None), None),
        (tracked(128, 64), (64, [10])),  # the last is of a token more than there are
        (tracked(128, None), None),
        (tracked(128, 64, index=0, slots_of=1), None),
    ],
)
def test_the_last_snapshot_of_tokens_that_there_are_is_taken(request_, found):
    snapshot = slots.last_snapshot(request_, tokens_max=127)
    assert (snapshot and (snapshot.tokens, snapshot.slot.tolist())) == found
