"""What a decode engine has offered, written where a prefill engine's linker says, is the same KV
of the same tokens: on SGLang's pools, allocators and radix tree, with an agent made up."""

from __future__ import annotations

import ctypes
from array import array
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from common.block import Namespace
from common.messages.from_engines import Deliver, PullBlocks
from engine import runtime
from engine.decode.persist import Persister
from engine.kv_memory import KvMemory
from engine.page_table import PageTable
from engine.prefill.hit_loads import HitLoads
from engine.sglang.kv_pool import memory_of, window_of
from engine.sglang.prefill.linker import PrefillLinker
from tests.engine.parts import Parts, Request
from tests.engine.transfers.test_window_pools import (
    KV_LAYERS,
    PAGE,
    PAGES,
    WINDOW_LAYERS,
    WINDOWS,
    new_pool,
)

PROMPT = list(range(100, 122))
WINDOW_TOKENS = 2 * PAGE - 1
Store = dict[tuple[int, bytes], bytes]
"""(pool, key of the block) -> bytes."""


@pytest.fixture(scope="module", autouse=True)
def _cpu_platform():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_PLATFORM", "dualpath_cpu")
        yield


class Engine:
    """SGLang's memory, and our parts over it."""

    def __init__(self, role: str, seed: int) -> None:
        from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator

        self.pool = new_pool()
        torch.manual_seed(seed)
        for part in (self.pool.full_kv_pool, self.pool.swa_kv_pool):
            for buffer in (*part.k_buffer, *part.v_buffer):
                buffer.normal_()
        self.allocator = SWATokenToKVPoolAllocator(
            PAGES * PAGE, WINDOWS * PAGE, PAGE, torch.float32, "cpu", self.pool, True
        )
        self.memory = memory_of(self.pool, kv_heads=2, window_tokens=WINDOW_TOKENS)
        parts = tuple(each.part for each in self.memory.parts)
        namespace = Namespace("model", "1", "float32", self.memory.layout, parts=parts)
        self.parts = Parts(role, namespace=namespace)

    def kv(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """K and V of a layer."""
        if layer in WINDOW_LAYERS:
            rows = self.pool.translate_loc_from_full_to_swa(rows)
        return torch.stack([buffer[rows] for buffer in self.pool.get_kv_buffer(layer)])


def move(memory: KvMemory, job: PullBlocks | Deliver, store: Store, write: bool) -> None:
    """An agent: all layers of what the job names, into the store or out of it."""
    pools = [(memory.layout, memory.addresses, job.keys, job.pages)]
    for part, named in zip(memory.parts, job.parts, strict=True):
        pools.append((part.part.layout, part.addresses, named.keys, named.places))
    for number, (layout, addresses, keys, places) in enumerate(pools):
        for key, place in zip(keys, places, strict=True):
            seen, at = b"", 0
            for layer in range(layout.num_layers):
                for size, base in zip(layout.sizes(layer), addresses[layer], strict=True):
                    if size and write:
                        ctypes.memmove(base + place * size, store[number, key][at:], size)
                    seen += ctypes.string_at(base + place * size, size) if size else b""
                    at += size
            store.setdefault((number, key), seen)


def stored(d: Engine) -> tuple[Store, torch.Tensor]:
    """What D has offered of a prompt that P has sent, and the rows of its tokens there."""
    tail = len(PROMPT) - (len(PROMPT) - 1 - WINDOW_TOKENS) // PAGE * PAGE
    start, end = torch.tensor([0]), torch.tensor([len(PROMPT)])
    rows = d.allocator.alloc_extend_swa_tail(
        start, start, end, end, torch.tensor([-1]), len(PROMPT), swa_tail_len=tail
    )
    table = torch.zeros((1, 32), dtype=torch.int32)
    table[0, : len(PROMPT)] = rows
    scheduler: Any = SimpleNamespace(
        token_to_kv_pool_allocator=d.allocator, sliding_window_size=WINDOW_TOKENS
    )
    pages = PageTable(table, PAGE, window=window_of(scheduler))
    engine = d.parts
    persister = Persister(engine.config, pages, engine.jobs, engine.links, engine.plans)
    request = Request("r", PROMPT)
    persister.begin(request)
    persister.advance(request, len(PROMPT))
    store: Store = {}
    for _, job in engine.links.of(PullBlocks):
        move(d.memory, job, store, write=False)
    return store, rows


def loaded(p: Engine, blocks: int, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, Parts]:
    """Rows that SGLang's tree gives to a hit of the plan, whose delivery has begun."""
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    params = CacheInitParams(
        disable=False,
        req_to_token_pool=ReqToTokenPool(4, 64, "cpu", enable_memory_saver=False),
        token_to_kv_pool_allocator=p.allocator,
        page_size=PAGE,
        sliding_window_size=WINDOW_TOKENS,
        tree_components=(ComponentType.FULL, ComponentType.SWA),
    )
    tree: Any = UnifiedRadixCache(params)
    linker = PrefillLinker(None, params, components=set(tree.components))
    tree.init_cache_linker(linker)
    engine: Any = p.parts
    engine.hit_loads = HitLoads(engine.config, engine.plans, engine.deliveries, None)
    monkeypatch.setattr(runtime, "_runtime", engine)
    request = Request("r", PROMPT)
    plan = engine.plan(request, blocks, ("a", "b"))
    needed = len(p.memory.parts[0].part.needed(blocks))
    engine.plans.put(msgspec.structs.replace(plan, part_readers=[[1] * needed]))
    request.kv, request.session, request.swa_branching_seqlen = None, None, None
    key = RadixKey(array("q", PROMPT[:-1]), None)
    found = tree.tree_core.match_prefix(MatchPrefixParams(key=key, req=request))
    request.last_node = found.last_device_node
    assert tree.linker.match(key, request, found).host_hit_length == blocks * PAGE
    assert tree.linker.load_back(request)[0] == blocks * PAGE
    rows = tree.linker.private_load_indices["r"]
    linker.start_layer_wise_loading()
    return rows, engine


@pytest.mark.parametrize("blocks", [5])
def test_a_prefix_that_was_offered_is_the_same_where_it_was_loaded(monkeypatch, blocks):
    d, p = Engine("decode", 1), Engine("prefill", 2)
    assert d.parts.weights.digest == p.parts.weights.digest
    store, at_d = stored(d)
    at_p, engine = loaded(p, blocks, monkeypatch)
    for _, job in engine.jobs_sent():
        move(p.memory, job, store, write=True)
    end = blocks * PAGE
    for layer in KV_LAYERS:
        assert torch.equal(d.kv(layer, at_d[:end]), p.kv(layer, at_p))
    last = slice(end - 2 * PAGE, end)
    for layer in WINDOW_LAYERS:
        assert torch.equal(d.kv(layer, at_d[last]), p.kv(layer, at_p[last]))
    assert not p.pool.translate_loc_from_full_to_swa(at_p[: end - 2 * PAGE]).any()
