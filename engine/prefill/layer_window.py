"""A layer window (:mod:`engine.prefill.layer_ring`) in use: KV comes when its layer does.

A forward's prefix is in device memory only while its layer computes, so all of it is
brought again for every forward, layer by layer: hit blocks by the plan's agents, on credits;
the pages of a request's earlier chunks out of the decode engine's memory, where they were
sent as they were computed. (From there they move once. Kept in host memory as well, they
would move twice, and every chunk would be copied in case there is another.)

Nothing that this engine computed stays in its memory, so its radix tree stays empty.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import msgspec

from common.messages.from_gateway import EnginePlan
from engine.page_table import PageTable
from engine.plans import PLANS_MAX
from engine.prefill.credit_writer import CreditWriter
from engine.prefill.layer_copies import LayerCopies
from engine.prefill.layer_ring import LayerRing, RingStuck
from engine.prefill.suffix_send import Earlier, SuffixSender
from engine.sglang.views import Request
from engine.streams import HostPages
from engine.transfers.deliveries import Deliveries, Delivery
from engine.transfers.session_workers import SessionWorkers

READ_TIMEOUT_S = 20.0


class _Hit(msgspec.Struct, frozen=True):
    """The first ``pages`` pages of a request's prompt are those of the plan."""

    plan: EnginePlan
    pages: int


class ReadBack:
    """Pages of a request's earlier chunks, read from the decode engine layer by layer."""

    def __init__(self, rid: str, earlier: Earlier, pages: HostPages, first_position: int):
        self.rid = rid
        self.error = ""
        self._earlier = earlier
        self._pages = pages
        self._first_position = first_position
        self._layers = 0
        self._condition = threading.Condition()

    def run(self, ring: LayerRing, copies: LayerCopies) -> None:
        """In a worker: each layer as soon as its buffer is free."""
        try:
            here, there = self._pages.get(), self._earlier.pages
            for layer in range(ring.num_layers):
                ring.wait_free(self._first_position + layer, READ_TIMEOUT_S)
                copies.copy("read", self._earlier.session_id, here, there, layer)
                with self._condition:
                    self._layers = layer + 1
                    self._condition.notify()
        except (ConnectionError, RingStuck) as error:
            with self._condition:
                self.error = f"earlier chunk not read: {error}"
                self._condition.notify()

    def wait_layer(self, layer: int) -> None:
        """Until the layer is here or the reading has failed."""
        deadline_s = time.monotonic() + READ_TIMEOUT_S
        with self._condition:
            while not self.error and self._layers <= layer:
                if not self._condition.wait(max(0.0, deadline_s - time.monotonic())):
                    self.error = f"earlier chunk not read within {READ_TIMEOUT_S} s"


class WindowForward:
    """What one forward waits for, layer by layer."""

    def __init__(self, window: LayerWindow, first_position: int) -> None:
        self._window = window
        self.first_position = first_position
        self.deliveries: list[Delivery] = []
        self.reads: list[ReadBack] = []
        self.agents: set[str] = set()

    def before_layer(self, layer: int) -> None:
        """Return when the layer's buffer is free and its prefix is there, or has failed."""
        deliveries = self._window.deliveries
        with deliveries.waiting(layer):
            self._window.ring.wait_free(self.first_position + layer)
            for read in self.reads:
                read.wait_layer(layer)
        for delivery in self.deliveries:
            deliveries.wait_layer(delivery, layer)

    def layer_left(self, layer: int) -> None:
        """The layer's attention has run and its new KV has left (any thread)."""
        self._window.ring.finish(self.first_position + layer)
        self._window.push_credits()

    def abandon(self) -> None:
        """Stop the writers of deliveries that have failed."""
        for delivery in self.deliveries:
            if delivery.error:
                self._window.deliveries.abandon(delivery)

    def failed(self) -> dict[str, str]:
        """Requests whose prefix was not all there -> the reason."""
        parts: list[Delivery | ReadBack] = [*self.deliveries, *self.reads]
        return {part.rid: part.error for part in parts if part.error}


class LayerWindow:
    """Brings the prefix of each forward. One for each engine with a window."""

    def __init__(
        self,
        ring: LayerRing,
        table: PageTable,
        suffix: SuffixSender,
        deliveries: Deliveries,
        credits: CreditWriter,
        workers: SessionWorkers,
    ) -> None:
        self.ring = ring
        self.deliveries = deliveries
        self._table = table
        self._suffix = suffix
        self._credits = credits
        self._workers = workers
        self._hits: OrderedDict[str, _Hit] = OrderedDict()
        self._forwards = 0
        self._open: list[WindowForward] = []
        self.read_back_pages_total = 0

    def note_hit(self, plan: EnginePlan, pages: int) -> None:
        """The linker has found that the first ``pages`` pages of a request are the plan's."""
        self._hits[plan.rid] = _Hit(plan, pages)
        while len(self._hits) > PLANS_MAX:
            self._hits.popitem(last=False)

    def begin(self, requests: Sequence[Request]) -> WindowForward:
        """Have the prefix of a forward brought; its new KV must be planned already."""
        first_position = self._forwards * self.ring.num_layers
        self._forwards += 1
        forward = WindowForward(self, first_position)
        for request in requests:
            self._bring(forward, request)
        self._open = [f for f in self._open if not self._is_over(f)] + [forward]
        self.push_credits()
        return forward

    def push_credits(self) -> None:
        """Tell the agents that write for the open forwards how far they may go."""
        for agent in {agent for forward in self._open for agent in forward.agents}:
            self._credits.push(agent)

    def _is_over(self, forward: WindowForward) -> bool:
        return self.ring.free_until >= forward.first_position + self.ring.num_layers

    def _bring(self, forward: WindowForward, request: Request) -> None:
        if not request.prefix_len:
            return
        pages = self._table.pages(request, 0, request.prefix_len)
        hit = self._hits.get(request.rid)
        planned = min(hit.pages, len(pages)) if hit is not None else 0
        if hit is not None and planned:
            delivery = self.deliveries.start(
                hit.plan, 0, pages[:planned], first_position=forward.first_position
            )
            forward.deliveries.append(delivery)
            forward.agents.update(writer.agent for writer in delivery.writers)
        if len(pages) > planned:
            start = planned * self._table.page_tokens
            self._read_back(forward, request, pages[planned:], start)

    def _read_back(
        self, forward: WindowForward, request: Request, pages: HostPages, start: int
    ) -> None:
        """Pages from token ``start`` on, which this engine has computed."""
        earlier = self._suffix.earlier(request, start, len(pages))
        if earlier is None:
            lost = Delivery(request.rid, self.ring.num_layers, deadline=0.0)
            lost.fail(f"the prefix from token {start} on is neither planned nor sent")
            forward.deliveries.append(lost)
            return
        read = ReadBack(request.rid, earlier, pages, forward.first_position)
        forward.reads.append(read)
        self.read_back_pages_total += len(pages)
        self._workers.submit(
            f"read {earlier.session_id}", partial(read.run, self.ring, self._suffix.copies)
        )
