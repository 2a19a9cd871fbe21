"""A prefill engine with streams: nothing leaves, and nothing is overwritten, before the kernel
that writes or reads it has run."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

from common.messages.from_engines import Deliver
from engine import runtime
from engine.sglang.prefill.linker import PrefillLinker
from tests.engine.parts import Request, hashes_of
from tests.engine.prefill.sends import LAYERS, PAGE, PAGE_BYTES, request
from tests.engine.streams.prefill_world import ORDERS, PrefillWorld

HERE, THERE = [3, 9, 4], [8, 1, 2]
"""Pages of a request at this engine, and at its decode engine."""


@pytest.fixture
def make(monkeypatch):
    def make(*args: Any, **kwargs: Any) -> PrefillWorld:
        world = PrefillWorld(monkeypatch, *args, **kwargs)
        monkeypatch.setattr(runtime, "_runtime", world)
        return world

    return make


def asked(world: PrefillWorld, room: int = 7, **changes: Any) -> Any:
    """A request whose KV is all this engine's to compute."""
    made = request(world.manager, room, len(HERE) * PAGE, HERE, THERE, **changes)
    return SimpleNamespace(rid=f"r{room}", prefix_len=0, **vars(made))


def arrived(world: PrefillWorld, layer: int) -> list[bool]:
    """Whether what was computed into each page is at the decode engine."""
    return [
        world.at_peer(layer, there) == world.computed.get((layer, here))
        for here, there in zip(HERE, THERE, strict=True)
    ]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("components", [2, 1], ids=["mha", "mla"])
def test_kv_leaves_when_it_is_computed(make, order, overlap, components):
    world = make(order, overlap, components)
    world.run_batch(HERE, asked(world))
    assert not world.computed, "the scheduler's thread waited for the forward"
    world.workers.run()
    world.device.drain()
    for layer in range(LAYERS):
        assert arrived(world, layer) == [True] * 3, f"layer {layer}"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("components", [2, 1], ids=["mha", "mla"])
def test_a_layer_leaves_while_later_ones_compute(make, order, components):
    world = make(order, components=components)
    world.run_batch(HERE, asked(world))
    for layer in range(LAYERS):
        world.workers.run(calls=1)
        assert all(arrived(world, layer))
        last_seen = min(layer + 1, LAYERS - 1)  # a latent leaves when the next layer begins
        assert (last_seen, HERE[0]) not in world.computed or last_seen == layer


@pytest.mark.parametrize("order", [*ORDERS, "unseen"])
@pytest.mark.parametrize("components", [2, 1], ids=["mha", "mla"])
def test_layers_that_no_hook_sees_are_counted_and_leave_at_the_end(make, order, components):
    world = make(order, components=components)
    world.run_batch(HERE, asked(world))
    unseen = LAYERS - (components == 1)  # the last latent is told by no layer after it
    assert world.prefill_forwards.unseen_layers_total == (unseen if order == "unseen" else 0)
    world.workers.run()
    world.device.drain()
    assert all(all(arrived(world, layer)) for layer in range(LAYERS))


@pytest.mark.parametrize("order", ORDERS)
def test_a_batch_is_planned_while_the_one_before_computes(make, order):
    world = make(order)
    world.run_batch(HERE, asked(world))
    # SGLang's barrier: what the scheduler writes next comes behind all of this forward.
    world.device.wait_stream(world.device.schedule, world.device.forward)
    world.run_batch([20], asked(world, 8))
    assert not world.computed and world.device.waited_in == []
    world.workers.run()
    world.device.drain()
    assert all(all(arrived(world, layer)) for layer in range(LAYERS))


# ---- hits ------------------------------------------------------------------------------------


def test_hit_pages_are_named_when_they_are_known_and_no_forward_is_waited_for(make):
    world = make()
    world.run_batch(HERE, asked(world))
    world.device.wait_stream(world.device.schedule, world.device.forward)
    allocator = SimpleNamespace(get_kvcache=lambda: "the pool")
    params = SimpleNamespace(
        token_to_kv_pool_allocator=allocator, page_size=PAGE, req_to_token_pool=None
    )
    linker = PrefillLinker(None, params, components=set())
    hit = Request("hit", list(range(100, 118)))
    plan = world.plan(hit, 4)
    hashes = [PoolTransfer(name=PoolName.KV, keys=[h.hex() for h in hashes_of(hit)])]
    assert linker.lookup("hit", hashes) == [1, 2, 3, 4]
    rows = torch.full((4 * PAGE,), -1)
    pages = torch.tensor([5, 6, 11, 12])
    allocated = (pages[:, None] * PAGE + torch.arange(PAGE)).reshape(-1)
    world.device.launch(lambda: rows.copy_(allocated))
    linker.load("hit", [PoolTransfer(name=PoolName.KV, device_indices=rows)])
    index = linker.start_layer_wise_loading()
    assert world.links.of(Deliver) == [] and world.device.waited_in == []
    world.workers.run()
    ((_, deliver),) = world.jobs_sent()
    assert (deliver.pages, deliver.keys) == ([5, 6, 11, 12], plan.keys)
    assert sorted(world.holds.held_pages()) == [5, 6, 11, 12]
    world.write(deliver, LAYERS)
    assert linker.finish_layer_wise_loading(index)


# ---- the layer window ------------------------------------------------------------------------


@pytest.mark.parametrize("components", [2, 1], ids=["mha", "mla"])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_buffer_of_the_window_is_filled_again_when_its_layer_has_left(make, components, overlap):
    world = make("eager", overlap, components, window=2)
    for room in (7, 8):  # the second one's first layers follow on the first one's last ones
        world.run_batch(HERE, asked(world, room))
        world.prefill_forwards.window.ring.wait_free((room - 6) * LAYERS + 1, 20)
        assert all(all(arrived(world, layer)) for layer in range(LAYERS)), f"forward {room}"
    assert threading.current_thread().name not in world.device.waited_in


@pytest.mark.parametrize("components", [2, 1], ids=["mha", "mla"])
@pytest.mark.parametrize("overlap", [True, False])
def test_agents_fill_a_buffer_when_the_attention_that_reads_it_has_run(make, overlap, components):
    world = make("eager", overlap, components, window=2)
    window, prefix = world.prefill_forwards.window, HERE[0]
    own = [buffer.reshape(-1, PAGE_BYTES) for buffer in world.manager.own]
    read: list[int] = []
    world.reads = lambda layer: read.append(int(own[layer][prefix, 0]))

    def agent() -> None:
        """Writes each layer of each forward's prefix as soon as it has the credit."""
        for forward in range(2):
            while len(world.jobs_sent()) <= forward:
                time.sleep(0.001)
            _, job = world.jobs_sent()[forward]
            for layer in range(LAYERS):
                window.ring.wait_free(job.first_position + layer, 20)
                for buffer in own[layer::LAYERS]:
                    buffer[prefix] = job.first_position + layer + 1
                world.write(job, layer + 1)

    threading.Thread(target=agent, daemon=True).start()
    for room in (7, 8):
        made = request(world.manager, room, 3 * PAGE, HERE, THERE[1:], prefix_pages=1)
        asked_for = SimpleNamespace(rid=f"r{room}", prefix_len=PAGE, **vars(made))
        window.note_hit(world.plan(Request(asked_for.rid, made.origin_input_ids), 1), 1)
        world.run_batch(HERE[1:], asked_for)
    window.ring.wait_free(2 * LAYERS + 1, 20)
    world.device.drain()
    assert read == list(range(1, 2 * LAYERS + 1)), "each kernel's own prefix"


def test_credits_for_a_buffer_come_when_its_layer_has_been_computed(make):
    """Agents write into it at once: what the attention still reads would be gone."""
    world = make("eager", window=2)
    ring = world.prefill_forwards.window.ring
    world.run_batch(HERE, asked(world, disagg_kv_sender=None))
    ring.wait_free(LAYERS + 1, 20)
    assert all((layer, HERE[0]) in world.computed for layer in range(LAYERS))


def test_a_layer_waits_once_though_both_hooks_come(make, monkeypatch):
    world = make("eager", window=2)
    ring = world.prefill_forwards.window.ring
    waited, wait_free = [], ring.wait_free

    def counted(position: int, *timeout_s: float) -> None:
        waited.append(position)
        wait_free(position, *timeout_s)

    monkeypatch.setattr(ring, "wait_free", counted)
    for room in (7, 8):
        world.run_batch(HERE, asked(world, room))
    assert waited == list(range(2 * LAYERS))


# ---- time ------------------------------------------------------------------------------------


def test_the_clock_counts_what_the_device_computes_and_not_what_it_stands_still(make):
    """Of a wait of 8 ms, the device stands still for what is left when it has done what it had
    been given: a layer takes 2 ms."""
    world = make()

    def inside(layer: int) -> None:
        if layer == 1:
            with world.deliveries.waiting(layer):
                world.device.host_ms += 8.0

    world.inside = inside
    for room in (7, 8, 9):  # the clock hands over a forward when two more are under way
        world.run_batch([20], asked(world, room))
    (sample,) = world.samples
    assert sample.forward_s == pytest.approx(0.006)
    assert sample.attention_s == pytest.approx(0.003)
