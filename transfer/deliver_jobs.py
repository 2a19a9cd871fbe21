"""Delivery jobs of an agent: from ``Deliver`` to ``JobEnded``."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable

import msgspec
import numpy as np

from storage.slot_pool import SlotPool
from transfer.agent_metrics import AgentCounters
from transfer.delivery import JobCancelled, QueueFull, TransferJob, TransferQueue
from transfer.engines import BadPages, Engine, page_array
from transfer.messages import Deliver, Delivered, JobEnded
from transfer.mooncake import TransferFailed

log = logging.getLogger(__name__)

LANDED_AFTER_ALIVE_S = 1.0
"""An engine that has run for so long since a write to it failed has taken in, or lost, what
was still on its way. Only then is the job over: a suspended engine takes it in when resumed."""

_FIRST_OWNER = 1 << 62
"""Owners of jobs' pins are numbered from here: plans have 48 bits."""


class BlocksMissing(Exception):
    """Blocks of a delivery are not in DRAM, or not kept there by its plan."""

    def __init__(self, missing: int, of: int) -> None:
        super().__init__(f"{missing} of {of} blocks are not in DRAM for this plan")


class _Landing(msgspec.Struct):
    """A failed delivery of which bytes may still land."""

    engine: Engine
    job: int
    error: str
    failed_at: float
    heard_at: float | None = None
    """First sign of life of the engine after the failure."""


class DeliverJobs:
    """Starts, cancels and ends deliveries. Lives in the agent's loop.

    A job pins its slots itself, so neither the release nor the deadline of its plan lets a
    slot be reused while a transfer reads it.
    """

    def __init__(
        self,
        queue: TransferQueue,
        pool: SlotPool,
        memory_address: int,
        reply: Callable[[Engine, JobEnded], None],
        tell: Callable[[Delivered], None],
        incarnation: int,
        counters: AgentCounters,
        is_zero_io: Callable[[int], bool],
    ) -> None:
        self._is_zero_io = is_zero_io
        self._queue = queue
        self._pool = pool
        self._memory_address = memory_address
        self._reply = reply
        self._tell = tell
        self._incarnation = incarnation
        self._counters = counters
        self._owners = itertools.count(_FIRST_OWNER)
        self._landing: list[_Landing] = []

    def start(self, engine: Engine, message: Deliver) -> None:
        """Queue a delivery; one that cannot be made fails, on the board as well."""
        owner = next(self._owners)
        started = time.monotonic()
        slots = pages = np.empty(0, np.int64)
        refused: BadPages | BlocksMissing | None = None
        zero_io = self._is_zero_io(message.plan)
        try:
            if not zero_io:
                pages = page_array(message.pages, len(message.keys))
                slots = self._slots(message)
        except (BadPages, BlocksMissing) as error:
            refused, pages = error, slots

        def ended(error: Exception | None) -> None:
            self._pool.unpin_all(owner)
            self._ended(engine, job, started, error)

        job = TransferJob(
            message.job,
            engine.session_id,
            engine.layout,
            engine.kv_addresses,
            slots,
            pages,
            started + message.deadline_s,
            ended,
            urgent=message.urgent,
            plan=message.plan,
            board_address=message.board_address,
            stop_reason=refused,
            layers_done=engine.layout.num_layers - 1 if zero_io else 0,
            credit=engine.credit if message.first_position >= 0 and not zero_io else None,
            first_position=message.first_position,
        )
        try:
            self._queue.submit(job)
        except QueueFull as error:
            self._ended(engine, job, started, error)
            return
        engine.jobs[message.job] = self._queue, job
        if refused is None and not zero_io:
            for key in message.keys:
                self._pool.pin(key, owner)

    def heard(self, engine: Engine) -> None:
        """A sign of life: jobs of the engine may turn out to be over."""
        now = time.monotonic()
        for landing in [landing for landing in self._landing if landing.engine is engine]:
            if landing.heard_at is None:
                landing.heard_at = now
            elif now - landing.heard_at >= LANDED_AFTER_ALIVE_S:
                self._landing.remove(landing)
                self._say_ended(engine, landing.job, landing.error)

    def engine_gone(self, engine: Engine) -> None:
        """The process is dead, and its memory with it: nothing can land."""
        self._landing = [landing for landing in self._landing if landing.engine is not engine]

    @property
    def landing_jobs(self) -> int:
        """Failed deliveries whose last bytes may still be on their way."""
        return len(self._landing)

    def _slots(self, message: Deliver) -> np.ndarray:
        """Addresses of the blocks' slots; raises :class:`BlocksMissing`."""
        pool, plan = self._pool, message.plan
        present = [pool.is_resident(k) and pool.is_pinned_by(k, plan) for k in message.keys]
        if not all(present):
            raise BlocksMissing(present.count(False), len(present))
        return self._memory_address + pool.offsets(message.keys)

    def _ended(
        self, engine: Engine, job: TransferJob, started: float, error: Exception | None
    ) -> None:
        engine.jobs.pop(job.job, None)
        outcome, seconds = "failed", time.monotonic() - started
        if error is None:
            outcome = "ok"
            self._tell(Delivered(job.plan, engine.name, job.nbytes, seconds))
        elif isinstance(error, JobCancelled):
            outcome = "cancelled"
        self._counters.delivered(engine.name, outcome, job.nbytes)
        log.log(
            logging.WARNING if outcome == "failed" else logging.INFO,
            "delivery ended engine=%s plan=%d job=%d outcome=%s blocks=%d bytes=%d "
            "seconds=%.4f error=%s",
            *(engine.name, job.plan, job.job, outcome, len(job.pages), job.nbytes),
            *(seconds, error or ""),
        )
        if isinstance(error, TransferFailed):
            if not engine.is_gone:
                failed_at = time.monotonic()
                self._landing.append(_Landing(engine, job.job, str(error), failed_at))
        else:
            self._say_ended(engine, job.job, str(error or ""))

    def _say_ended(self, engine: Engine, job: int, error: str) -> None:
        self._reply(engine, JobEnded(self._incarnation, job, error))
