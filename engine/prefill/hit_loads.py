"""Prefill engine: the hit prefix of a batch is delivered while its forward runs.

SGLang asks how much of a request's prompt can be restored, hands out device pages for that,
and lets each layer's attention wait for that layer (:mod:`engine.sglang.prefill.linker`). Here
the answer comes from the plan that the gateway announced, the bytes come by one-sided writes
from the plan's readers, and the wait reads the completion board. The gateway sends a request
only when its blocks are in DRAM, so a forward waits for delivery, never for storage.

A request whose delivery failed is dropped alone (its batch-mates are unaffected), and the
gateway sends it again without a plan: its blocks are recomputed.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from engine.config import EngineConfig
from engine.plans import PLANS_MAX, Fit, Plans
from engine.prefill.layer_window import LayerWindow
from engine.streams import HostPages
from engine.transfers.deliveries import Deliveries, Delivery

log = logging.getLogger(__name__)


class _Load(msgspec.Struct, frozen=True):
    fit: Fit
    pages: HostPages
    of_parts: Sequence[HostPages]


class BatchLoad:
    """What one batch waits for."""

    def __init__(self, deliveries: Deliveries, parts: Sequence[Delivery], alone: int) -> None:
        """``alone``: layers that are waited for one by one, the first ones."""
        self.parts = parts
        self._deliveries = deliveries
        self._alone = alone

    def wait_layer(self, layer: int) -> None:
        """Block the forward until the layer is ready for every request of the batch, or its
        delivery has failed; each delivery has its own timeout."""
        if layer >= self._alone:
            layer = self._deliveries.num_layers - 1
        for delivery in self.parts:
            self._deliveries.wait_layer(delivery, layer)

    def wait(self) -> None:
        """Until all of it has come or failed."""
        self.wait_layer(self._deliveries.num_layers - 1)


class LayerGate:
    """What the KV pool asks before each layer's attention. A *consumer index* names what one
    batch waits for; -1 is a batch that loads nothing."""

    def __init__(self) -> None:
        self._of_index: dict[int, BatchLoad] = {}
        self._next_index = 0
        self.consumer_index = -1
        """Of the batch whose forward runs, or runs next; SGLang looks at it."""

    def add(self, batch: BatchLoad) -> int:
        """Index for a batch about to run."""
        index, self._next_index = self._next_index, self._next_index + 1
        self._of_index[index] = batch
        return index

    def set_consumer(self, index: int) -> None:
        """The batch whose forward runs next."""
        self.consumer_index = index

    def wait_until(self, layer: int) -> None:
        """Block the forward until a layer is there."""
        batch = self._of_index.get(self.consumer_index)
        if batch is not None:
            batch.wait_layer(layer)

    def take(self, index: int) -> BatchLoad | None:
        """What a batch has waited for whose forward has run."""
        return self._of_index.pop(index, None)

    def reset(self) -> None:
        """After a flush nothing may wait for earlier deliveries."""
        self._of_index.clear()
        self.consumer_index = -1


class HitLoads:
    """From a request's look-up to the end of its batch's forward; in the scheduler's thread.

    With a layer window it is the forward that has the blocks delivered: nothing is queued here.
    """

    def __init__(
        self,
        config: EngineConfig,
        plans: Plans,
        deliveries: Deliveries,
        window: LayerWindow | None,
    ) -> None:
        # A draft runs right behind the model, and asks nobody.
        layers = plans.weights.namespace.layout.model_layers
        self._alone = layers - 1 if config.experiment.load_by_layer else 0
        self._plans = plans
        self._deliveries = deliveries
        self._window = window
        self._found: OrderedDict[str, Fit] = OrderedDict()
        """Until SGLang queues the load, which it does not for a request that is aborted."""
        self._queued: dict[str, _Load] = {}
        self._failed: set[str] = set()

    def look_up(self, rid: str, hashes: list[bytes]) -> Sequence[int]:
        """How many pages can be restored from where the engine's own cache ends, each number
        that is possible; ``hashes`` are of all the pages of the prompt from there on. Where the
        model's state has parts, it is there at the plan's end alone."""
        fit = self._plans.fit_tail(rid, hashes)
        parts = self._plans.weights.namespace.parts
        if fit is None or (parts and not fit.ends_whole(parts)):
            return ()
        self._found.pop(rid, None)
        self._found[rid] = fit
        while len(self._found) > PLANS_MAX:
            self._found.popitem(last=False)
        if self._window is not None:
            self._window.note_hit(fit.plan, fit.blocks)
        return (fit.blocks,) if parts else range(1, fit.blocks + 1)

    def queue(self, rid: str, pages: HostPages, of_parts: Sequence[HostPages] = ()) -> None:
        """The pages into which what was found is to be delivered, with the next batch; of each
        part the places for what belongs to the last ones."""
        fit = self._found.pop(rid)
        if self._window is None:
            self._queued[rid] = _Load(fit, pages, of_parts)

    def cancel(self, rid: str) -> bool:
        """Drop a load that has not started; whether one was queued."""
        self._found.pop(rid, None)
        return self._queued.pop(rid, None) is not None

    def start(self) -> BatchLoad | None:
        """Send what is queued to the agents; None where nothing is."""
        if not self._queued:
            return None
        queued, self._queued = self._queued, {}
        parts = [
            self._deliveries.start(
                load.fit.plan, load.fit.first_block, load.pages, of_parts=load.of_parts
            )
            for load in queued.values()
        ]
        return BatchLoad(self._deliveries, parts, self._alone)

    def finish(self, batch: BatchLoad) -> bool:
        """Wait for the last layers; True when every delivery has landed."""
        batch.wait()
        for delivery in batch.parts:
            if delivery.error:
                log.warning("delivery failed rid=%s reason=%r", delivery.rid, delivery.error)
                self._deliveries.abandon(delivery)
                self._failed.add(delivery.rid)
        return not self._failed

    def take_failed(self) -> set[str]:
        """Requests whose KV did not land since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    def reset(self) -> None:
        """After a flush."""
        self._found.clear()
        self._queued.clear()
        self._failed.clear()
