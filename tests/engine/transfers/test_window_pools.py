"""Windows in a pool of their own, on SGLang's pools and allocators."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.block import BlockLayout
from engine import runtime
from engine.page_table import PageTable
from engine.sglang import pool_hooks
from engine.sglang.decode import restore_hooks
from engine.sglang.kv_pool import UnsupportedPool, allocators_of, memory_of, window_of
from engine.transfers.page_holds import PageHolds
from tests.engine.parts import Request, hooked_allocator

PAGE, PAGES, WINDOWS = 4, 12, 6
WINDOW_LAYERS, KV_LAYERS = [0, 2], [1, 3, 4]
ROW_BYTES = 2 * 8 * 4


@pytest.fixture(scope="module", autouse=True)
def _cpu_platform():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_PLATFORM", "dualpath_cpu")
        yield


def new_pool(**changes: Any) -> Any:
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    settings = dict(
        size=PAGES * PAGE,
        size_swa=WINDOWS * PAGE,
        page_size=PAGE,
        dtype=torch.float32,
        head_num=2,
        head_dim=8,
        swa_attention_layer_ids=WINDOW_LAYERS,
        full_attention_layer_ids=KV_LAYERS,
        device="cpu",
        enable_alt_stream=False,
    )
    return SWAKVPool(**settings | changes)


def _allocator(pool: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Hooked as in an engine."""
    from sglang.srt.mem_cache.allocator import swa

    monkeypatch.setattr(runtime, "_runtime", None)
    monkeypatch.setattr(swa, "PagedTokenToKVPoolAllocator", hooked_allocator())
    platform = SimpleNamespace(get_paged_allocator_cls=lambda: None)
    monkeypatch.setattr(swa, "current_platform", platform)
    return swa.SWATokenToKVPoolAllocator(
        PAGES * PAGE, WINDOWS * PAGE, PAGE, torch.float32, "cpu", pool, True
    )


@pytest.fixture
def world(monkeypatch) -> Any:
    pool = new_pool()
    allocator = _allocator(pool, monkeypatch)
    kv_pages, windows = allocators_of(allocator)
    holds = PageHolds(kv_pages, [PageHolds(windows)])
    monkeypatch.setattr(runtime, "_runtime", SimpleNamespace(holds=holds))
    return SimpleNamespace(pool=pool, allocator=allocator, holds=holds, of_windows=holds.parts[0])


def _extend(allocator: Any, tokens: int) -> Any:
    """Rows for a new request's tokens, as SGLang takes them."""
    return allocator.alloc_extend(
        torch.tensor([0]), torch.tensor([0]), torch.tensor([tokens]), torch.tensor([tokens]),
        torch.tensor([-1]), tokens,
    )  # fmt: skip


def _pages(rows: Any) -> list[int]:
    return (rows[::PAGE] // PAGE).tolist()


def test_pages_of_each_kind_of_layer_are_where_the_map_says():
    pool = new_pool()
    memory = memory_of(pool, kv_heads=2, window_tokens=2 * PAGE - 1)
    (windows,) = memory.parts
    whole = (PAGE * ROW_BYTES, PAGE * ROW_BYTES)
    assert memory.layout == BlockLayout(PAGE, 5, whole, absent=((0, 2), (0, 2)))
    assert memory.kv_layers == KV_LAYERS
    assert windows.part.layout == BlockLayout(PAGE, 5, whole, absent=((1, 3, 4), (1, 3, 4)))
    assert (windows.part.name, windows.part.span_pages) == ("window", 2)
    assert memory.layout.block_bytes + windows.part.layout.block_bytes == 5 * 2 * PAGE * ROW_BYTES
    for layer in range(5):
        for component, buffer in enumerate(pool.get_kv_buffer(layer)):
            buffer[2 * PAGE : 3 * PAGE] = 10 * layer + component + 1
            here, there = memory.addresses[layer][component], windows.addresses[layer][component]
            assert (here == 0) == (layer in WINDOW_LAYERS) and (there == 0) == (layer in KV_LAYERS)
            seen = ctypes.string_at(max(here, there) + 2 * PAGE * ROW_BYTES, PAGE * ROW_BYTES)
            assert seen == bytes(buffer[2 * PAGE : 3 * PAGE].view(torch.uint8).flatten().tolist())


def test_of_several_ranks_each_has_its_heads_of_both():
    memory = memory_of(new_pool(), kv_heads=4, window_tokens=PAGE)
    assert (memory.layout.shards, memory.parts[0].part.layout.shards) == (2, 1)
    assert memory.layout.component_bytes == memory.parts[0].part.layout.component_bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"full_attention_layer_ids": [], "swa_attention_layer_ids": [0, 1]},
        {"swa_attention_layer_ids": [0, 5]},
    ],
    ids=["windows alone", "a layer is elsewhere"],
)
def test_a_pool_with_other_layers_is_refused(changes):
    with pytest.raises(UnsupportedPool, match="layers"):
        memory_of(new_pool(**changes), kv_heads=2, window_tokens=PAGE)


def test_windows_with_heads_of_their_own_are_refused():
    pool = new_pool()
    pool.swa_kv_pool.head_num = 1
    with pytest.raises(UnsupportedPool, match="otherwise"):
        memory_of(pool, kv_heads=2, window_tokens=PAGE)


def test_windows_that_are_kept_by_request_are_refused():
    pool = new_pool()
    pool.swa_req_ring_size = 8
    with pytest.raises(UnsupportedPool, match="by request"):
        memory_of(pool, kv_heads=2)


def test_a_held_page_of_either_pool_comes_back_when_the_job_has_ended(world):
    rows = _extend(world.allocator, 3 * PAGE)
    windows = world.allocator.translate_loc_from_full_to_swa(rows)
    world.holds.hold(1, _pages(rows), [_pages(windows)[1:]])
    world.allocator.free(rows)
    assert world.allocator.full_available_size() == (PAGES - 3) * PAGE
    assert world.allocator.swa_available_size() == (WINDOWS - 2) * PAGE
    assert pool_hooks.after_session_held(0, None) == 3 * PAGE
    assert pool_hooks.after_session_held_windows(0, None) == 2 * PAGE
    world.holds.release(1)
    assert world.allocator.full_available_size() == PAGES * PAGE
    assert world.allocator.swa_available_size() == WINDOWS * PAGE
    assert pool_hooks.after_session_held_windows(0, None) == 0


def test_a_window_that_sglang_drops_while_its_request_runs_stays_until_it_was_pulled(world):
    rows = _extend(world.allocator, 3 * PAGE)
    windows = world.allocator.translate_loc_from_full_to_swa(rows).clone()
    world.holds.hold(1, [], [_pages(windows)[:1]])
    world.allocator.free_swa(rows[:PAGE])
    assert world.allocator.swa_available_size() == (WINDOWS - 3) * PAGE
    world.holds.release(1)
    assert world.allocator.swa_available_size() == (WINDOWS - 2) * PAGE


def test_a_flush_keeps_held_pages_of_both_pools_out(world):
    rows = _extend(world.allocator, 2 * PAGE)
    windows = world.allocator.translate_loc_from_full_to_swa(rows)
    world.holds.hold(1, _pages(rows)[:1], [_pages(windows)])
    world.allocator.clear()
    assert world.allocator.full_available_size() == (PAGES - 1) * PAGE
    assert world.allocator.swa_available_size() == (WINDOWS - 2) * PAGE
    world.holds.release(1)
    assert world.allocator.available_size() == WINDOWS * PAGE


def test_windows_under_a_transfer_are_no_room_for_a_new_request(world):
    world.holds.expect(1, 2, [3])
    assert restore_hooks.less_unevictable_windows(100, None) == 100 - 3 * PAGE
    rows = _extend(world.allocator, 2 * PAGE)
    world.holds.hold(1, _pages(rows), [_pages(rows)])
    assert restore_hooks.less_unevictable_windows(100, None) == 100 - 2 * PAGE


def test_noise_goes_into_both_pools_but_for_held_pages(world):
    world.holds.hold(1, [3], [[2]])
    scheduler = SimpleNamespace(token_to_kv_pool_allocator=world.allocator, draft_worker=None)
    pool_hooks.poison_pool(runtime.runtime(), scheduler)
    for of, kept in ((world.pool.full_kv_pool, 3), (world.pool.swa_kv_pool, 2)):
        for buffer in (*of.k_buffer, *of.v_buffer):
            noisy = [page for page, rows in enumerate(buffer.split(PAGE)) if rows.any()]
            assert noisy == [page for page in range(len(buffer) // PAGE) if page != kept]


def test_a_requests_windows_are_found_by_its_tokens(world):
    scheduler = SimpleNamespace(
        token_to_kv_pool_allocator=world.allocator, sliding_window_size=2 * PAGE - 1
    )
    rows = _extend(world.allocator, 3 * PAGE)
    windows = _pages(world.allocator.translate_loc_from_full_to_swa(rows))
    table = torch.zeros((2, 8 * PAGE), dtype=torch.int32)
    table[0, : 3 * PAGE] = rows
    pages = PageTable(table, PAGE, window=window_of(scheduler))
    request = Request("r", [])
    assert pages.pages(request, 0, 3 * PAGE).get().tolist() == _pages(rows)
    assert pages.window_pages(request, PAGE, 3 * PAGE).get().tolist() == windows[1:]
    world.allocator.free_swa(rows[: 2 * PAGE])
    assert pages.window_pages(request, 0, 3 * PAGE).get().tolist() == [0, 0, windows[2]]


def test_a_pool_without_windows_has_none():
    scheduler = SimpleNamespace(token_to_kv_pool_allocator=SimpleNamespace())
    assert window_of(scheduler) is None
    assert allocators_of(scheduler.token_to_kv_pool_allocator) == [
        scheduler.token_to_kv_pool_allocator
    ]
