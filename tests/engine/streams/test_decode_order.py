"""A decode engine with streams, under SGLang's overlap loop: a batch is launched before the
result of the one before is looked at, so a request that ends is in one forward too many."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from common.messages.codec import Message
from common.messages.from_engines import CancelJob, Deliver, PullBlocks
from engine import runtime
from engine.sglang.decode import persist_hooks
from engine.streams import Streams
from tests.engine.decode.queues import DecodeParts, Queues
from tests.engine.parts import LAYERS, PAGE, Links, Request
from tests.engine.streams.device import Device, Workers

DELIVERED = -7


class SwiftAgents(Links):
    """Agents that have read, or written, the pages by the time a message is sent."""

    def __init__(self, kv: torch.Tensor) -> None:
        super().__init__()
        self.kv = kv
        self.stored: dict[int, list[int]] = {}

    def send(self, agent: str, message: Message) -> bool:
        if isinstance(message, PullBlocks):
            for page in message.pages:
                self.stored[page] = self.kv[page].tolist()
        elif isinstance(message, Deliver):
            self.kv[message.pages] = DELIVERED
        return super().send(agent, message)


class DecodeLoop:
    """SGLang's event_loop_overlap_disagg_decode for one running request: row ``p`` of its KV
    is computed by the forward that gets token ``p``."""

    def __init__(self, monkeypatch: Any, overlap: bool = True) -> None:
        self.device, self.workers, self.overlap = Device(), Workers(), overlap
        forward = self.device.forward if overlap else None
        self.engine = DecodeParts(streams=Streams(self.device, forward))
        self.kv = torch.zeros((64, PAGE), dtype=torch.int64)
        self.engine.deliveries.workers = cast(Any, self.workers)
        self.agents = SwiftAgents(self.kv)
        for part in (self.engine.persister, self.engine.restores, self.engine.deliveries):
            cast(Any, part)._links = self.agents
        monkeypatch.setattr(runtime, "_runtime", self.engine)
        self.queues = Queues(self.engine)
        self.committed = 0

    def start(self, request: Any) -> None:
        """P's part has come."""
        prompt = len(request.origin_input_ids)
        self.engine.rows[0] = torch.arange(10 * PAGE, 10 * PAGE + self.engine.rows.shape[1])
        self.kv.view(-1)[10 * PAGE : 10 * PAGE + prompt] = torch.arange(1000, 1000 + prompt)
        request.output_ids = [1]
        self.committed = prompt
        self.engine.persister.begin(request)
        persist_hooks.before_checkpoint(None, request, up_to=prompt)

    def launch(self) -> None:
        """The next decode batch."""
        position = self.committed
        row = 10 * PAGE + position
        self.committed += 1
        device = self.device
        device.wait_stream(device.forward, device.schedule)
        with device.on(device.forward if self.overlap else device.schedule):
            device.launch(lambda: self.kv.view(-1).__setitem__(row, 1000 + position))

    def result(self, request: Any, finished: bool = False) -> None:
        """Of the batch before the one in flight."""
        request.output_ids.append(1)
        batch = SimpleNamespace(reqs=[request])
        if finished:
            request.finished_reason = "length"
            persist_hooks.before_checkpoint(None, request, up_to=self.committed)
        persist_hooks.after_batch_result(None, None, cast(Any, batch))


@pytest.fixture
def make(monkeypatch):
    return lambda **kwargs: DecodeLoop(monkeypatch, **kwargs)


@pytest.mark.parametrize("tokens", range(1, 3 * PAGE))
def test_a_block_is_stored_when_its_last_row_is_computed(make, tokens):
    loop = make()
    request = Request("r", list(range(2 * PAGE)))
    loop.start(request)
    loop.launch()
    for step in range(tokens):
        in_flight = loop.device.mark(loop.device.forward)
        loop.launch()
        in_flight.synchronize()  # SGLang waits for the copy of the result
        loop.result(request, finished=step == tokens - 1)
    loop.device.drain()
    assert loop.agents.stored
    for page, rows in loop.agents.stored.items():
        assert rows == loop.kv[page].tolist(), f"page {page} of {tokens} tokens"


@pytest.mark.parametrize("overlap", [True, False])
def test_a_page_is_delivered_behind_the_forward_that_still_writes_to_it(make, overlap):
    loop = make(overlap=overlap)
    ended = Request("ended", list(range(PAGE)))
    loop.start(ended)
    loop.launch()  # too many: the request has ended, and its pages are free
    page = (10 * PAGE + PAGE) // PAGE
    loop.engine.allocator.free_pages = torch.tensor([page, 20, 21, 22])
    request = Request("r", list(range(100, 118)))
    loop.engine.plan(request, 4)
    loop.device.waited_in.clear()
    waiting = loop.queues.admit(request)
    assert loop.agents.of(Deliver) == [] and loop.device.waited_in == []
    loop.workers.run()
    loop.device.drain()
    ((_, deliver),) = loop.agents.of(Deliver)
    assert deliver.pages == [page, 20, 21, 22]
    assert (loop.kv[deliver.pages] == DELIVERED).all()
    assert set(deliver.pages) <= set(loop.engine.holds.held_pages())
    loop.engine.write(deliver, LAYERS)
    assert len(loop.queues.polls()) == 1
    loop.queues.commit(waiting)


def test_a_request_that_is_aborted_before_its_delivery_began_keeps_its_pages_from_others(make):
    """Only the first rank tells agents; a rank where the device is slower holds them as well."""
    loop = make()
    loop.launch()
    request = Request("r", list(range(100, 118)))
    loop.engine.plan(request, 4)
    waiting = loop.queues.admit(request)
    assert loop.engine.holds.held_pages() == []
    loop.engine.restores.drop(request, waiting.prefix_match.dualpath_restore)
    pages = loop.agents.of(Deliver)[0][1].pages
    assert sorted(loop.engine.holds.held_pages()) == sorted(pages)
    kinds = [type(message) for _, message in loop.agents.sent]
    assert kinds.index(Deliver) < kinds.index(CancelJob)
    loop.workers.run()
    assert len(loop.agents.of(Deliver)) == 1


def test_without_work_in_flight_a_delivery_begins_at_once(make):
    loop = make()
    request = Request("r", list(range(100, 118)))
    loop.engine.plan(request, 4)
    loop.engine.streams.device = None
    loop.queues.admit(request)
    assert len(loop.agents.of(Deliver)) == 1 and not loop.workers.calls
