"""Deliveries: blocks on their way from agents' DRAM into this engine's KV pages.

One delivery serves one request and has one writer (an agent, with a job of its own) for
each reader in the request's plan. Layer ``l`` is ready when every writer's word on the
completion board says so. The agents' end is ``transfer/agent/jobs/deliver_jobs.py``.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import msgspec

from common.board_word import FAILED
from common.ids import NO_INCARNATION, NO_JOB, BoardSlot, JobId
from common.messages.from_engines import CancelJob, Deliver, PartPlaces
from common.messages.from_gateway import EnginePlan
from common.samples import Sample, sample
from engine.config import EngineConfig
from engine.prefill.forward_clock import Waits
from engine.ranks.group import Links
from engine.streams import PASSED, HostPages, Mark
from engine.transfers.completion_board import BoardFull, CompletionBoard
from engine.transfers.jobs import Jobs
from engine.transfers.session_workers import SessionWorkers

log = logging.getLogger(__name__)

_POLL_S = 0.0002


class _Writer(msgspec.Struct):
    agent: str
    slot: BoardSlot
    blocks: list[int]
    """Which of the delivery's blocks it writes."""
    of_parts: list[list[int]]
    """Of each part, which of the delivery's objects."""
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
        self.is_counted = False
        """Among those that have failed."""
        self.writers: list[_Writer] = []
        self._num_layers = num_layers
        self._deadline = deadline
        self._lock = threading.Lock()
        self._send: Callable[[], None] | None = None

    def send_by(self, send: Callable[[], None]) -> None:
        """How its writers are told to begin."""
        self._send = send

    def send(self) -> None:
        """Tell them, once: whoever comes first, all return when it is done."""
        with self._lock:
            send, self._send = self._send, None
            if send is not None:
                send()

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
        self.workers = SessionWorkers("dualpath-delivery")
        self.num_layers = num_layers
        self._timeout_s = config.deliver_timeout_s
        self._urgent = config.role == "prefill"
        self.started_total = 0
        self.failed_total = 0
        self.pause: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        """Around each wait of a forward: the clock's (:mod:`engine.prefill.forward_clock`)."""
        self.waited_s = [0.0] * num_layers
        """How long forwards have waited for KV, by layer."""
        self._waited_cpu_s = 0.0

    def start(
        self,
        plan: EnginePlan,
        first_block: int,
        pages: HostPages,
        behind: Mark = PASSED,
        first_position: int = -1,
        of_parts: Sequence[HostPages] = (),
    ) -> Delivery:
        """Have blocks ``first_block ...`` of the plan written into ``pages``; into a layer
        window from ``first_position`` on, as its credits allow (-1: at once). Agents begin when
        the device has passed ``behind``: no forward writes to the pages any more. ``of_parts``:
        of each part of the namespace, places for the plan's last blocks.

        Never raises for a transfer's sake: what cannot start is a failed delivery.
        """
        deadline = time.monotonic() + self._timeout_s
        delivery = Delivery(plan.rid, self.num_layers, deadline, first_position)
        self.started_total += 1
        shares = [
            [plan.reader_of(first_block + offset) for offset in range(len(pages))],
            *(_readers_of(plan, n, len(places)) for n, places in enumerate(of_parts)),
        ]
        for agent in dict.fromkeys(reader for share in shares for reader in share):
            blocks, *objects = (_places_of(agent, share) for share in shares)
            try:
                self._open(delivery, _Writer(agent, self.board.take(), blocks, objects))
            except BoardFull as error:
                delivery.fail(str(error))
        send = partial(self._send, delivery, plan, first_block, [pages, *of_parts], behind)
        delivery.send_by(send)
        if delivery.error:
            self.abandon(delivery)
        elif all(each.here.query() for each in (pages, *of_parts)) and behind.query():
            delivery.send()
        else:
            self.workers.submit("", delivery.send)
        return delivery

    def _open(self, delivery: Delivery, writer: _Writer) -> None:
        """Number its job now: all ranks open the same ones in the same order."""

        def failed(reason: str) -> None:
            delivery.fail(reason)
            self._tell_failure(writer.slot, writer.job)

        def ended(reason: str) -> None:
            if reason:
                delivery.fail(reason)
            writer.has_ended = not reason
            self.board.give_back(writer.slot)

        incarnation = self._links.incarnation(writer.agent) or NO_INCARNATION
        writer.job = self._jobs.open(writer.agent, incarnation, (), self._timeout_s, ended, failed)
        self._jobs.expect(writer.job, len(writer.blocks), [len(part) for part in writer.of_parts])
        delivery.writers.append(writer)

    def _send(
        self,
        delivery: Delivery,
        plan: EnginePlan,
        first_block: int,
        places: Sequence[HostPages],
        behind: Mark,
    ) -> None:
        """Hold the pages and have them written; waits for the device, as a rule in a worker."""
        behind.synchronize()
        pages, *of_parts = (each.get().tolist() for each in places)
        for writer in delivery.writers:
            into = [pages[block] for block in writer.blocks]
            parts = [
                PartPlaces(
                    keys=[plan.keys[len(plan.keys) - len(here) + n] for n in own],
                    places=[here[n] for n in own],
                )
                for own, here in zip(writer.of_parts, of_parts, strict=True)
            ]
            is_open = self._jobs.hold(writer.job, into, [part.places for part in parts])
            if not is_open or self._jobs.has_stopped(writer.job):
                continue
            message = Deliver(
                job=writer.job,
                plan=plan.id,
                keys=[plan.keys[first_block + block] for block in writer.blocks],
                pages=into,
                board_slot=writer.slot,
                urgent=self._urgent,
                deadline_s=self._timeout_s,
                first_position=delivery.first_position,
                parts=parts,
            )
            if not self._links.send(writer.agent, message):
                self._jobs.over(writer.job, f"agent {writer.agent} is not reachable")

    def abandon(self, delivery: Delivery) -> None:
        """Nobody wants the rest: stop the writers. Pages stay held until they have.

        Where they have not begun yet, they do so first: only the first rank tells the agents, and
        the others have to hold the pages, whose owner may give them back now.
        """
        delivery.send()
        if delivery.error and not delivery.is_counted:
            delivery.is_counted = True
            self.failed_total += 1
        for writer in delivery.writers:
            self._links.send(writer.agent, CancelJob(writer.job))

    def wait_layer(self, delivery: Delivery, layer: int) -> None:
        """Return when ``layer`` is ready or the delivery has failed; never later than its
        timeout. Called in the forward's thread: it sleeps without the GIL."""
        if delivery.error or delivery.layers_ready(self.board) > layer:
            return
        with self.waiting(layer):
            while not delivery.error and delivery.layers_ready(self.board) <= layer:
                time.sleep(_POLL_S)

    @contextlib.contextmanager
    def waiting(self, layer: int) -> Iterator[None]:
        """Count what passes as time in which a forward waits for KV."""
        began_s, began_cpu_s = time.monotonic(), time.thread_time()
        with self.pause():
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


def _readers_of(plan: EnginePlan, part: int, objects: int) -> list[str]:
    """Of the last so many objects of a part."""
    readers = plan.part_readers[part]
    return [plan.agents[reader] for reader in readers[len(readers) - objects :]]


def _places_of(agent: str, readers: list[str]) -> list[int]:
    return [place for place, reader in enumerate(readers) if reader == agent]
