"""Deliveries: jobs that write blocks from DRAM into an engine, from ``Deliver`` to ``JobEnded``.

The engine's end of a delivery is ``engine/transfers/deliveries.py``.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np

from common.block import BlockKey
from common.board_word import BOARD_WORD_BYTES
from common.ids import BoardSlot, PlanId
from common.messages.from_agents import Delivered, JobEnded
from common.messages.from_engines import Deliver
from common.tracing.spans import Attributes, Span
from storage.slot_pool import SlotPool
from transfer.agent.engine_pools import BadJob, EnginePool
from transfer.agent.engines import Engine, Rank
from transfer.agent.jobs.heads import OtherShards
from transfer.agent.jobs.job import Job
from transfer.agent.jobs.reports import Reports
from transfer.agent.jobs.transfer import Ended, Group, JobCancelled, Transfer, no_blocks
from transfer.agent.jobs.transfer_queue import TransferQueue
from transfer.agent.plan_spans import PlanSpans
from transfer.mooncake import TransferFailed
from transfer.ranges import Addresses

log = logging.getLogger(__name__)

_FIRST_OWNER = 1 << 62
"""Owners of jobs' pins are numbered from here: plans have 48 bits."""


class BlocksMissing(Exception):
    """Blocks of a delivery are not in DRAM, or not kept there by its plan."""

    def __init__(self, missing: int, of: int) -> None:
        super().__init__(f"{missing} of {of} blocks are not in DRAM for this plan")


class _Found(msgspec.Struct, frozen=True, eq=False):
    """What is to be sent of the blocks, or of the objects of a part; one element for each."""

    pool: EnginePool
    keys: list[BlockKey]
    places: np.ndarray
    offsets: np.ndarray
    """Of their slots in DRAM, bytes."""
    shards: np.ndarray
    """Of each one's layout."""


class _Delivery(msgspec.Struct, eq=False):
    """One job."""

    engine: Engine
    message: Deliver
    started: float
    span: Span
    """Of the plan; it may be over when the job ends."""
    refused: Exception | None = None
    layers_done: int = 0
    found: list[_Found] = []
    """By pool; empty if nothing is to be sent."""

    @property
    def blocks(self) -> int:
        """That are sent, parts not counted."""
        return len(self.found[0].keys) if self.found else 0


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
        is_zero_io: Callable[[PlanId], bool],
        reports: Reports,
        spans: PlanSpans,
    ) -> None:
        """``memory_address``: of the pool. ``is_zero_io``: whether a plan's blocks are not sent."""
        self._queue = queue
        self._pool = pool
        self._memory_address = memory_address
        self._is_zero_io = is_zero_io
        self._reports = reports
        self._spans = spans
        self._owners = itertools.count(_FIRST_OWNER)

    def start(self, engine: Engine, message: Deliver) -> None:
        """Queue a delivery; one that cannot be made fails, on the boards as well."""
        owner = next(self._owners)
        delivery = _Delivery(engine, message, time.monotonic(), self._spans.of(message.plan))
        if not engine.has_board_slot(message.board_slot):
            delivery.refused = BadJob(f"board slot {message.board_slot}")
        elif self._is_zero_io(message.plan):
            delivery.layers_done = engine.layout.num_layers - 1
        else:
            self._find(delivery)
        for found in delivery.found:
            for key in found.keys:
                self._pool.pin(key, owner)

        def ended(error: Exception | None) -> None:
            self._pool.unpin_all(owner)
            self._ended(delivery, job.nbytes, error)

        job = engine.jobs[message.job] = Job(self._queue, ended)
        job.submit([partial(self._transfer, delivery, rank) for rank in engine.ranks])

    def _find(self, delivery: _Delivery) -> None:
        """Where the blocks are, and into how many shards they are split."""
        engine, pool = delivery.engine, self._pool
        try:
            objects = engine.objects(delivery.message)
            self._check_present(delivery.message.plan, [k for each in objects for k in each.keys])
        except (BadJob, BlocksMissing) as error:
            delivery.refused = error
            return
        delivery.found = [
            _Found(
                of,
                each.keys,
                each.places,
                pool.offsets(each.keys),
                np.array([pool.label(key).layout.shards for key in each.keys], int),
            )
            for of, each in zip(engine.pools, objects, strict=False)
        ]

    def _transfer(self, delivery: _Delivery, rank: Rank, ended: Ended) -> Transfer:
        """What one rank gets of a delivery: its heads of each block."""
        message = delivery.message
        addresses = zip(delivery.found, rank.addresses, strict=False)
        groups = [self._group(found, each, rank.shard) for found, each in addresses]
        return Transfer(
            job=message.job,
            session_id=rank.session_id,
            groups=groups or [no_blocks(delivery.engine.layout.shard, rank.addresses[0])],
            deadline=delivery.started + message.deadline_s,
            ended=ended,
            urgent=message.urgent,
            plan=message.plan,
            board_address=_word_address(delivery.engine, rank, message.board_slot),
            stop_reason=delivery.refused,
            layers_done=delivery.layers_done,
            credit=rank.credit if message.first_position >= 0 else None,
            first_position=message.first_position,
        )

    def _group(self, found: _Found, addresses: Addresses, shard: int) -> Group:
        layout = found.pool.layout
        alike = found.shards == layout.shards
        in_slot = shard * layout.shard.block_bytes
        return Group(
            layout.shard,
            addresses,
            self._memory_address + found.offsets[alike] + in_slot,
            found.places[alike],
            [
                self._other_shards(found, shard, shards)
                for shards in np.unique(found.shards[~alike]).tolist()
            ],
        )

    def _other_shards(self, found: _Found, shard: int, shards: int) -> OtherShards:
        rows, layout = found.shards == shards, found.pool.layout
        return OtherShards(
            np.frombuffer(self._pool.memory, np.uint8).reshape(-1, self._pool.slot_bytes),
            found.offsets[rows] // self._pool.slot_bytes,
            found.places[rows],
            msgspec.structs.replace(layout, shards=shards),
            layout.shards,
            shard,
        )

    def _check_present(self, plan: PlanId, keys: list[BlockKey]) -> None:
        pool = self._pool
        present = [k in pool.resident and pool.is_pinned_by(k, plan) for k in keys]
        if not all(present):
            raise BlocksMissing(present.count(False), len(present))

    def _ended(self, delivery: _Delivery, nbytes: int, error: Exception | None) -> None:
        engine, message = delivery.engine, delivery.message
        engine.jobs.pop(message.job, None)
        outcome, seconds = "failed", time.monotonic() - delivery.started
        if error is None:
            outcome = "ok"
            self._reports.tell(Delivered(message.plan, engine.name, nbytes, seconds))
        elif isinstance(error, JobCancelled):
            outcome = "cancelled"
        self._reports.counters.delivered(engine.name, outcome, nbytes)
        log.log(
            logging.WARNING if outcome == "failed" else logging.INFO,
            "delivery ended engine=%s plan=%d job=%d outcome=%s blocks=%d bytes=%d "
            "seconds=%.4f error=%s",
            engine.name,
            message.plan,
            message.job,
            outcome,
            delivery.blocks,
            nbytes,
            seconds,
            error or "",
        )
        self._spans.delivered(delivery.span, delivery.started, outcome, _told(delivery, nbytes))
        may_land = isinstance(error, TransferFailed)
        engine.failures += may_land
        end = JobEnded(self._reports.incarnation, message.job, str(error or ""), may_land)
        self._reports.reply(engine, end)


def _word_address(engine: Engine, rank: Rank, slot: BoardSlot) -> int:
    """Of a completion word at a rank; 0 where there is none."""
    has_word = engine.has_board_slot(slot)
    return rank.board_address + slot * BOARD_WORD_BYTES if has_word else 0


def _told(delivery: _Delivery, nbytes: int) -> Attributes:
    """What its span says."""
    return {
        "engine": delivery.engine.name,
        "plan": delivery.message.plan,
        "blocks": delivery.blocks,
        "bytes": nbytes,
    }
