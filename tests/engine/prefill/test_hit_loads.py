"""A prefill engine's linker, as SGLang's external-cache wrapper drives it."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

from common.block import BlockKey
from common.board_word import FAILED
from common.experiment import Experiment
from common.messages.from_engines import CancelJob, Deliver
from engine import runtime
from engine.prefill import hit_loads
from engine.prefill.hit_loads import HitLoads
from engine.ranks.group import RankGroup
from engine.sglang.prefill import linker
from engine.sglang.prefill.linker import PrefillLinker
from tests.engine.parts import (
    EARLIER_WEIGHTS,
    LAYERS,
    PAGE,
    UNDER_A_DRAFT,
    Parts,
    Request,
    hashes_of,
    keys_of,
)

PROMPT = list(range(100, 122))  # five blocks and two tokens


class PrefillParts(Parts):
    """Of a prefill engine."""

    def __init__(self, window: Any = None, **settings: Any) -> None:
        super().__init__("prefill", **settings)
        self.hit_loads = HitLoads(self.config, self.plans, self.deliveries, window)
        self.ranks = RankGroup(0, 1, None, lambda event: None)


class Wrapper:
    """SGLang's UnifiedCacheLinkerWrapper: from a match to the end of the batch's forward."""

    def __init__(self, linker: PrefillLinker) -> None:
        self.cache_linker = linker
        self.inflight_load_rids: list[str] = []

    def match(self, request: Any, cached_blocks: int = 0) -> list[int]:
        bigrams = runtime.runtime().weights.namespace.layout.bigrams
        keys = [page_hash.hex() for page_hash in hashes_of(request, bigrams)[cached_blocks:]]
        others = PoolTransfer(name=PoolName.MAMBA, keys=["00"])
        return self.cache_linker.lookup(
            request.rid, [others, PoolTransfer(name=PoolName.KV, keys=keys)]
        )

    def load(self, request: Any, pages: list[int]) -> None:
        rows = torch.tensor(pages)[:, None] * PAGE + torch.arange(PAGE)
        transfer = PoolTransfer(name=PoolName.KV, device_indices=rows.reshape(-1))
        assert self.cache_linker.load(request.rid, [transfer])
        self.inflight_load_rids.append(request.rid)

    def run(self, index: int) -> list[str]:
        """After the forward: the requests that have to go."""

        def original(wrapper):
            rids, self.inflight_load_rids = self.inflight_load_rids, []
            return [] if self.cache_linker.finish_layer_wise_loading(index) else rids

        return linker.only_failed_requests(original, self)


@pytest.fixture
def make(monkeypatch):
    def make(window=None, **settings) -> tuple[PrefillParts, Wrapper]:
        engine = PrefillParts(window, **settings)
        allocator = SimpleNamespace(get_kvcache=lambda: "the pool")
        params = SimpleNamespace(
            token_to_kv_pool_allocator=allocator, req_to_token_pool=None, page_size=PAGE
        )
        monkeypatch.setattr(runtime, "_runtime", None)
        linker = PrefillLinker(None, params, components=set())
        linker.reset()  # SGLang may, before the runtime is up
        assert linker.pools == {PoolName.KV: "the pool"}
        monkeypatch.setattr(runtime, "_runtime", engine)
        return engine, Wrapper(linker)

    return make


@pytest.fixture
def parts(make):
    return make()


# ---- what can be restored ----


@pytest.mark.parametrize(
    ("planned", "cached", "restorable"),
    [(5, 0, 5), (3, 0, 3), (5, 2, 3), (3, 2, 1), (3, 3, 0), (2, 4, 0), (0, 0, 0)],
)
def test_what_the_plan_has_beyond_the_cache_can_be_restored(parts, planned, cached, restorable):
    engine, sglang = parts
    request = Request("r", PROMPT)
    engine.plan(request, planned)
    assert sglang.match(request, cached) == list(range(1, restorable + 1))


def test_without_a_plan_nothing_can_be_restored(parts):
    _, sglang = parts
    assert sglang.match(Request("r", PROMPT)) == []


def test_only_leading_blocks_of_the_prompt_itself_are_restored(parts):
    engine, sglang = parts
    request = Request("r", PROMPT)
    keys = keys_of(request, engine.weights.digest)
    keys[2] = BlockKey(b"x" * 32)
    engine.plan(request, 5, keys=keys)
    assert sglang.match(request) == [1, 2]
    assert sglang.match(request, 1) == [1]
    assert sglang.match(request, 2) == []


def test_a_plan_of_another_prompt_or_tenant_restores_nothing(parts):
    engine, sglang = parts
    engine.plan(Request("r", PROMPT[1:]), 5)
    assert sglang.match(Request("r", PROMPT)) == []
    engine.plan(Request("r", PROMPT), 5)
    assert sglang.match(Request("r", PROMPT, cache_salt="tenant")) == []


def test_a_plan_of_other_weights_restores_nothing(parts):
    engine, sglang = parts
    request = Request("r", PROMPT)
    engine.plan(request, 5, namespace_digest=EARLIER_WEIGHTS)
    assert sglang.match(request) == []
    engine.plan(request, 5)
    engine.weights.changed("2", is_clean=True)
    assert sglang.match(request) == []


# ---- deliveries ----


def test_each_reader_is_asked_for_its_blocks_into_the_pages_given(parts):
    engine, sglang = parts
    request = Request("r", PROMPT)
    plan = engine.plan(request, 5, readers=("a", "b"))
    assert sglang.match(request, 2) == [1, 2, 3]
    sglang.load(request, [9, 4, 7])
    assert engine.jobs_sent() == []  # the batch may still be given up
    assert sglang.cache_linker.start_layer_wise_loading() == 0
    asked = {agent: (job.keys, job.pages) for agent, job in engine.jobs_sent()}
    assert asked == {
        "a": ([plan.keys[2], plan.keys[4]], [9, 7]),
        "b": ([plan.keys[3]], [4]),
    }
    assert all(job.plan == plan.id and job.urgent for _, job in engine.jobs_sent())
    assert sorted(engine.holds.held_pages()) == [4, 7, 9]


def test_a_draft_finds_its_layers_there_since_the_models_last_one_has_waited_for_them(make):
    engine, sglang = make(namespace=UNDER_A_DRAFT)
    request = Request("r", PROMPT)
    engine.plan(request, 2)
    assert sglang.match(request) == [1, 2]  # by keys over bigrams
    sglang.load(request, [3, 4])
    gate = sglang.cache_linker.layer_done_counter
    gate.set_consumer(sglang.cache_linker.start_layer_wise_loading())
    ((_, job),) = engine.jobs_sent()
    engine.write(job, 1)
    gate.wait_until(0)
    waited = threading.Thread(target=gate.wait_until, args=[1])
    engine.write(job, LAYERS - 1)  # all but the draft's
    waited.start()
    waited.join(0.2)
    assert waited.is_alive()
    engine.write(job, LAYERS)
    waited.join(10)
    assert not waited.is_alive()


def test_fewer_pages_than_were_found_are_filled_from_the_front(parts):
    engine, sglang = parts
    request = Request("r", PROMPT)
    plan = engine.plan(request, 5)
    sglang.match(request)
    sglang.load(request, [3, 4])  # another rank has found no more
    sglang.cache_linker.start_layer_wise_loading()
    ((_, job),) = engine.jobs_sent()
    assert (job.keys, job.pages) == (plan.keys[:2], [3, 4])


def test_a_load_is_started_once(parts):
    engine, sglang = parts
    request = Request("r", PROMPT)
    engine.plan(request, 5)
    sglang.match(request)
    sglang.load(request, [1, 2, 3, 4, 5])
    linker = sglang.cache_linker
    assert [linker.start_layer_wise_loading() for _ in range(2)] == [0, -1]
    assert len(engine.jobs_sent()) == 1
    assert not linker.cancel_queued_load("r")


def test_a_cancelled_load_never_starts(parts):
    engine, sglang = parts
    request = Request("r", PROMPT)
    engine.plan(request, 5)
    sglang.match(request)
    sglang.load(request, [1, 2, 3, 4, 5])
    assert sglang.cache_linker.cancel_queued_load("r")
    assert not sglang.cache_linker.cancel_queued_load("r")
    assert sglang.cache_linker.start_layer_wise_loading() == -1
    assert engine.jobs_sent() == []


def test_a_flush_forgets_what_was_found_queued_and_waited_for(parts):
    engine, sglang = parts
    request = Request("r", PROMPT)
    engine.plan(request, 5)
    for pages in ([1, 2], [3, 4]):
        sglang.match(request)
        sglang.load(request, pages)
        if pages == [1, 2]:
            sglang.cache_linker.layer_done_counter.set_consumer(
                sglang.cache_linker.start_layer_wise_loading()
            )
    sglang.match(request)
    sglang.cache_linker.reset()
    assert sglang.cache_linker.start_layer_wise_loading() == -1
    sglang.cache_linker.layer_done_counter.wait_until(LAYERS - 1)  # at once
    assert sglang.cache_linker.layer_done_counter.take(0) is None
    with pytest.raises(KeyError):
        sglang.load(request, [5, 6])
    assert len(engine.jobs_sent()) == 1


def test_with_a_layer_window_the_forward_has_the_blocks_delivered(make):
    noted = []
    window = SimpleNamespace(note_hit=lambda plan, pages: noted.append((plan.id, pages)))
    engine, sglang = make(window=window)
    request = Request("r", PROMPT)
    plan = engine.plan(request, 3)
    assert sglang.match(request) == [1, 2, 3]
    sglang.load(request, [1, 2, 3])
    assert noted == [(plan.id, 3)]
    assert sglang.cache_linker.start_layer_wise_loading() == -1
    assert engine.links.of(Deliver) == [] and sglang.run(-1) == []


# ---- the forward ----


def _loading(engine: Parts, sglang: Wrapper, *rids: str) -> tuple[int, list[Deliver]]:
    for number, rid in enumerate(rids):
        request = Request(rid, PROMPT)
        engine.plan(request, 2)
        sglang.match(request)
        sglang.load(request, [2 * number + 1, 2 * number + 2])
    index = sglang.cache_linker.start_layer_wise_loading()
    sglang.cache_linker.layer_done_counter.set_consumer(index)
    return index, [job for _, job in engine.jobs_sent()]


def _forward(sglang: Wrapper, layer: int) -> tuple[threading.Thread, threading.Event]:
    ready = threading.Event()

    def wait() -> None:
        sglang.cache_linker.layer_done_counter.wait_until(layer)
        ready.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread, ready


def test_a_layer_waits_for_every_request_of_the_batch_and_for_no_later_layer(parts):
    engine, sglang = parts
    index, (first, second) = _loading(engine, sglang, "r", "s")
    engine.write(first, 2)
    thread, ready = _forward(sglang, 1)
    engine.write(second, 1)
    assert not ready.wait(0.05)
    engine.write(second, 2)
    assert ready.wait(5)
    thread.join(5)
    for job in (first, second):
        engine.write(job, LAYERS)
    assert sglang.run(index) == []


def test_loaded_as_a_whole_the_first_layer_waits_for_the_last(make):
    engine, sglang = make(experiment=Experiment(load_by_layer=False))
    _, (job,) = _loading(engine, sglang, "r")
    engine.write(job, LAYERS - 1)
    thread, ready = _forward(sglang, 0)
    assert not ready.wait(0.05)
    engine.write(job, LAYERS)
    assert ready.wait(5)
    thread.join(5)


def test_a_batch_that_loads_nothing_waits_for_nothing(parts):
    engine, sglang = parts
    _loading(engine, sglang, "r")
    sglang.cache_linker.layer_done_counter.set_consumer(-1)
    sglang.cache_linker.layer_done_counter.wait_until(LAYERS - 1)


def test_a_failed_delivery_drops_its_own_request_and_stops_its_writers(parts):
    engine, sglang = parts
    index, (first, second) = _loading(engine, sglang, "r", "s")
    engine.write(first, FAILED)
    engine.write(second, LAYERS)
    sglang.cache_linker.layer_done_counter.wait_until(LAYERS - 1)
    assert sglang.run(index) == ["r"]
    assert engine.links.of(CancelJob) == [("a", CancelJob(first.job))]
    assert engine.deliveries.failed_total == 1
    assert sorted(engine.holds.held_pages()) == [1, 2, 3, 4]  # until the writers have ended
    index, (*_, again) = _loading(engine, sglang, "r")
    engine.write(again, LAYERS)
    assert sglang.run(index) == []  # a failure is told once


def test_a_request_that_failed_at_another_rank_is_dropped_here_too(parts):
    engine, sglang = parts
    index, jobs = _loading(engine, sglang, "r", "s")
    for job in jobs:
        engine.write(job, LAYERS)
    engine.ranks.all_of = lambda flags: [flags[0], False]
    assert sglang.run(index) == ["s"]


def test_a_late_delivery_fails_and_keeps_no_forward_waiting(make):
    engine, sglang = make(deliver_timeout_s=0.05)
    index, (job,) = _loading(engine, sglang, "r")
    began = time.monotonic()
    sglang.cache_linker.layer_done_counter.wait_until(0)
    assert time.monotonic() - began < 5
    engine.write(job, LAYERS)
    assert sglang.run(index) == ["r"]


def test_an_agent_that_is_away_drops_the_request_at_once(parts):
    engine, sglang = parts
    engine.links.reachable = False
    index, _ = _loading(engine, sglang, "r")
    sglang.cache_linker.layer_done_counter.wait_until(LAYERS - 1)
    assert sglang.run(index) == ["r"]
    assert engine.holds.held_pages() == []


def test_nothing_is_persisted_from_here(parts):
    _, sglang = parts
    assert not sglang.cache_linker.offload([])
    assert sglang.cache_linker.num_completed_offloads() == 0


def test_what_was_found_for_requests_that_never_load_is_bounded(parts, monkeypatch):
    monkeypatch.setattr(hit_loads, "PLANS_MAX", 8)
    engine, _ = parts
    requests = [Request(f"r{number}", PROMPT) for number in range(50)]
    for request in requests:
        engine.plan(request, 5)
        assert engine.hit_loads.look_up(request.rid, hashes_of(request)) == range(1, 6)
    assert len(engine.hit_loads._found) == 8
    assert not engine.hit_loads.cancel("r49") and len(engine.hit_loads._found) == 7
