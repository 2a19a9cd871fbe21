"""Deliveries: blocks on their way from agents' DRAM into this engine's KV pages.

One delivery serves one request and has one writer (an agent, with a job of its own) for
each reader in the request's plan. Layer ``l`` is ready when every writer's word on the
completion board says so. The agents' end is ``transfer/agent/jobs/deliver_jobs.py``.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import msgspec

from common.block import BlockKey
from common.board_word import FAILED
from common.ids import NO_INCARNATION, NO_JOB, BoardSlot, JobId
from common.messages import CancelJob, Deliver, EnginePlan
from common.samples import Sample, sample
from engine.config import EngineConfig
from engine.prefill.forward_clock import Waits
from engine.ranks.group import Links
from engine.transfers.completion_board import BoardFull, CompletionBoard
from engine.transfers.jobs import Jobs

log = logging.getLogger(__name__)

_POLL_S = 0.0002


class _Writer(msgspec.Struct):
    agent: str
    slot: BoardSlot
    job: JobId = NO_JOB
    has_ended: bool = False
    """Ended well: every layer is delivered, and the slot may serve another job."""


class Delivery:
    """Progress of one request's blocks. ``error`` is empty until the delivery has failed;
    a failed one never becomes ready, and its pages must not be read."""

    def __init__(
        self, rid: str, num_layers: int, deadline: float, first_position: int = -1
    ) -> None:
        self.rid = rid
        self.first_position = first_position
        self.error = ""
        self.writers: list[_Writer] = []
        self._num_layers = num_layers
        self._deadline = deadline

    def fail(self, reason: str) -> None:
        """The first reason is kept."""
        if not self.error:
            self.error = reason

    def layers_ready(self, board: CompletionBoard) -> int:
        """How many leading layers are whole in device memory; 0 once failed."""
        ready = self._num_layers
        for writer in self.writers:
            if writer.has_ended:
                continue
            delivered = board.layers_delivered(writer.slot, writer.job)
            if delivered == FAILED:
                self.fail(f"agent {writer.agent} could not deliver")
            ready = min(ready, delivered)
        if ready < self._num_layers and time.monotonic() > self._deadline:
            self.fail("delivery timed out")
        return 0 if self.error else ready

    def is_complete(self, board: CompletionBoard) -> bool:
        """Every layer of every block is in device memory."""
        return not self.error and self.layers_ready(board) == self._num_layers


class Deliveries:
    """Starts deliveries and follows them. Thread-safe."""

    def __init__(
        self,
        config: EngineConfig,
        board: CompletionBoard,
        jobs: Jobs,
        links: Links,
        num_layers: int,
        tell_failure: Callable[[BoardSlot, JobId], None],
    ) -> None:
        """``tell_failure(slot, job)`` lets the other ranks' boards say that a job failed."""
        self._tell_failure = tell_failure
        self.board = board
        self._jobs = jobs
        self._links = links
        self.num_layers = num_layers
        self._timeout_s = config.deliver_timeout_s
        self._urgent = config.role == "prefill"
        self.started_total = 0
        self.failed_total = 0
        self.waited_s = [0.0] * num_layers
        """How long forwards have waited for KV, by layer."""
        self._waited_cpu_s = 0.0

    def start(
        self, plan: EnginePlan, first_block: int, pages: Sequence[int], first_position: int = -1
    ) -> Delivery:
        """Have blocks ``first_block ...`` of the plan written into ``pages``; into a layer
        window from ``first_position`` on, as its credits allow (-1: at once).

        Never raises for a transfer's sake: what cannot start is a failed delivery.
        """
        deadline = time.monotonic() + self._timeout_s
        delivery = Delivery(plan.rid, self.num_layers, deadline, first_position)
        self.started_total += 1
        share: dict[str, list[int]] = defaultdict(list)
        for offset in range(len(pages)):
            share[plan.reader_of(first_block + offset)].append(offset)
        for agent, offsets in share.items():
            keys = [plan.keys[first_block + offset] for offset in offsets]
            try:
                writer = _Writer(agent, self.board.take())
            except BoardFull as error:
                delivery.fail(str(error))
                continue
            self._start_writer(delivery, writer, plan, keys, [pages[o] for o in offsets])
        if delivery.error:
            self.abandon(delivery)
        return delivery

    def _start_writer(
        self,
        delivery: Delivery,
        writer: _Writer,
        plan: EnginePlan,
        keys: list[BlockKey],
        pages: list[int],
    ) -> None:
        def failed(reason: str) -> None:
            delivery.fail(reason)
            self._tell_failure(writer.slot, writer.job)

        def ended(reason: str) -> None:
            if reason:
                delivery.fail(reason)
            writer.has_ended = not reason
            self.board.give_back(writer.slot)

        incarnation = self._links.incarnation(writer.agent) or NO_INCARNATION
        writer.job = self._jobs.open(
            writer.agent, incarnation, pages, self._timeout_s, ended, failed
        )
        delivery.writers.append(writer)
        message = Deliver(
            job=writer.job,
            plan=plan.id,
            keys=keys,
            pages=pages,
            board_slot=writer.slot,
            urgent=self._urgent,
            deadline_s=self._timeout_s,
            first_position=delivery.first_position,
        )
        if not self._links.send(writer.agent, message):
            self._jobs.over(writer.job, f"agent {writer.agent} is not reachable")

    def abandon(self, delivery: Delivery) -> None:
        """Nobody wants the rest: stop the writers. Pages stay held until they have."""
        self.failed_total += bool(delivery.error)
        for writer in delivery.writers:
            self._links.send(writer.agent, CancelJob(writer.job))

    def wait_layer(self, delivery: Delivery, layer: int) -> None:
        """Return when ``layer`` is ready or the delivery has failed; never later than its
        timeout. Called in the forward's thread: it sleeps without the GIL."""
        with self.waiting(layer):
            while not delivery.error and delivery.layers_ready(self.board) <= layer:
                time.sleep(_POLL_S)

    @contextlib.contextmanager
    def waiting(self, layer: int) -> Iterator[None]:
        """Count what passes as time in which a forward waits for KV."""
        began_s, began_cpu_s = time.monotonic(), time.thread_time()
        yield
        self.waited_s[layer] += time.monotonic() - began_s
        self._waited_cpu_s += time.thread_time() - began_cpu_s

    def samples(self) -> Iterator[Sample]:
        """For the metrics."""
        yield sample("engine_deliveries_total", self.started_total)
        yield sample("engine_deliveries_failed_total", self.failed_total)

    def waits(self) -> Waits:
        """Of all forwards so far."""
        return Waits(sum(self.waited_s), self._waited_cpu_s)
