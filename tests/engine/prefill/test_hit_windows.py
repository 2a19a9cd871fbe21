"""A prefill engine of a model with windows: a hit ends where its plan does, with its windows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

from engine import runtime
from engine.prefill.hit_loads import HitLoads
from engine.sglang.prefill.linker import PrefillLinker
from tests.engine.parts import LAYERS, PAGE, WITH_WINDOWS, Parts, Request, hashes_of, keys_of

PROMPT = list(range(100, 122))  # five blocks and two tokens


class PrefillParts(Parts):
    """Of a prefill engine."""

    def __init__(self) -> None:
        super().__init__("prefill", namespace=WITH_WINDOWS)
        self.hit_loads = HitLoads(self.config, self.plans, self.deliveries, None)


def sglang_allocator(kv: Any, windows: Any) -> Any:
    """An object of SGLang's class that was not set up."""
    from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator

    allocator: Any = SWATokenToKVPoolAllocator.__new__(SWATokenToKVPoolAllocator)
    allocator.full_attn_allocator = SimpleNamespace(get_kvcache=lambda: kv)
    allocator.swa_attn_allocator = SimpleNamespace(get_kvcache=lambda: windows)
    return allocator


@pytest.fixture
def engine(monkeypatch) -> PrefillParts:
    engine = PrefillParts()
    monkeypatch.setattr(runtime, "_runtime", engine)
    return engine


@pytest.fixture
def linker(engine) -> PrefillLinker:
    allocator = sglang_allocator("kv", "windows")
    params = SimpleNamespace(
        token_to_kv_pool_allocator=allocator, req_to_token_pool=None, page_size=PAGE
    )
    linker = PrefillLinker(None, params, components=set())
    assert linker.pools == {PoolName.KV: "kv", PoolName.SWA: "windows"}
    return linker


def planned(engine: Parts, request: Any, blocks: int, readers: list[list[int]]) -> None:
    plan = engine.plan(request, blocks, ("a", "b"))
    engine.plans.put(msgspec.structs.replace(plan, part_readers=readers))


def ask(linker: PrefillLinker, request: Any, cached: int = 0, end: int | None = None) -> list[int]:
    keys = [page_hash.hex() for page_hash in hashes_of(request)[cached:end]]
    return linker.lookup(request.rid, [PoolTransfer(name=PoolName.KV, keys=keys)])


def load(linker: PrefillLinker, request: Any, pages: list[int], windows: list[int]) -> None:
    transfers = []
    for name, numbers in ((PoolName.KV, pages), (PoolName.SWA, windows)):
        rows = torch.tensor(numbers)[:, None] * PAGE + torch.arange(PAGE)
        transfers.append(PoolTransfer(name=name, device_indices=rows.reshape(-1)))
    assert linker.load(request.rid, transfers)


def test_the_one_length_that_can_be_restored_is_the_whole_plan(engine, linker):
    request = Request("r", PROMPT)
    planned(engine, request, 4, [[0, 1]])
    assert ask(linker, request) == [4]
    assert ask(linker, request, cached=3) == [1]
    assert ask(linker, request, cached=4) == []
    assert ask(linker, request, end=3) == []  # SGLang does not ask as far as the plan goes


@pytest.mark.parametrize("readers", [[], [[]], [[0]], [[0, 0, 0]]])
def test_a_plan_without_the_windows_that_it_needs_is_none(engine, linker, readers):
    request = Request("r", PROMPT)
    planned(engine, request, 4, readers)
    assert ask(linker, request) == []


def test_each_reader_writes_its_blocks_and_its_windows(engine, linker):
    request = Request("r", PROMPT)
    planned(engine, request, 4, [[1, 1]])
    ask(linker, request)
    load(linker, request, [11, 12, 13, 14], [7, 5])
    linker.start_layer_wise_loading()
    of_a, of_b = (message for _, message in sorted(engine.jobs_sent()))
    keys = keys_of(request, engine.weights.digest)
    assert (of_a.keys, of_a.pages) == ([keys[0], keys[2]], [11, 13])
    assert [(part.keys, part.places) for part in of_a.parts] == [([], [])]
    assert (of_b.keys, of_b.pages) == ([keys[1], keys[3]], [12, 14])
    assert [(part.keys, part.places) for part in of_b.parts] == [([keys[2], keys[3]], [7, 5])]
    assert sorted(engine.holds.parts[0].held_pages()) == [5, 7]


def test_of_windows_that_the_engine_has_only_the_others_are_written(engine, linker):
    request = Request("r", PROMPT)
    planned(engine, request, 4, [[1, 0]])
    assert ask(linker, request, cached=3) == [1]
    load(linker, request, [14], [9])
    linker.start_layer_wise_loading()
    jobs = dict(engine.jobs_sent())
    keys = keys_of(request, engine.weights.digest)
    assert (jobs["b"].keys, jobs["b"].parts[0].keys) == ([keys[3]], [])
    assert (jobs["a"].keys, jobs["a"].parts[0].keys) == ([], [keys[3]])
    assert jobs["a"].parts[0].places == [9]


def test_a_layer_waits_for_whoever_writes_a_window_alone(engine, linker):
    request = Request("r", PROMPT)
    planned(engine, request, 4, [[1, 0]])
    ask(linker, request, cached=3)
    load(linker, request, [14], [9])
    index = linker.start_layer_wise_loading()
    batch = linker.layer_done_counter.take(index)
    assert batch is not None
    jobs = dict(engine.jobs_sent())
    engine.write(jobs["b"], LAYERS)
    assert batch.parts[0].layers_ready(engine.board) == 0
    engine.write(jobs["a"], LAYERS)
    assert batch.parts[0].layers_ready(engine.board) == LAYERS
