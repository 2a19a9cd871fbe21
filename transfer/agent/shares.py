"""Read shares of an agent: from ``ReadShare`` to ``ReleasePlan``."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from common.block import BlockKey, BlockLayout
from common.ids import PlanId
from common.messages.from_agents import ShareRead
from common.messages.from_gateway import ReadShare
from storage.share_reads import NO_SIZES
from storage.store_events import ShareSettled
from storage.tiered_store import TieredStore
from transfer.agent.plan_spans import PlanSpans

log = logging.getLogger(__name__)


class _Share(msgspec.Struct):
    """Where a plan's answer goes, and when the plan is released by itself."""

    client: bytes
    keys: list[BlockKey]
    release: asyncio.TimerHandle


class Shares:
    """Admits, answers and releases plans. Lives in the agent's loop."""

    def __init__(
        self,
        store: TieredStore,
        reply: Callable[[bytes, ShareRead], object],
        poll_store: Callable[[], None],
        can_deliver: Callable[[BlockLayout], bool],
        takes_zero_io: bool,
        spans: PlanSpans,
    ) -> None:
        """``can_deliver``: whether the engines can be given blocks of a layout. ``takes_zero_io``:
        whether this agent was started for a measurement without I/O."""
        self._takes_zero_io = takes_zero_io
        self._can_deliver = can_deliver
        self._store = store
        self._reply = reply
        self._poll_store = poll_store
        self._shares: dict[PlanId, _Share] = {}
        self._zero_io: set[PlanId] = set()
        self._spans = spans

    def start(self, client: bytes, message: ReadShare) -> None:
        """Have the blocks read; ``ShareRead`` follows. A plan that is known is ignored."""
        if message.plan in self._shares:
            return
        if message.experiment.zero_io and not self._takes_zero_io:
            log.error("plan without I/O refused: this agent measures nothing plan=%d", message.plan)
            self._reply_nothing(client, message)
            return
        if not self._are_sizes(message):
            log.error("share refused: sizes that no object has here plan=%d", message.plan)
            self._reply_nothing(client, message)
            return
        now = time.monotonic()
        loop = asyncio.get_running_loop()
        timer = loop.call_later(message.deadline_s, self._overdue, message.plan)
        self._shares[message.plan] = _Share(client, message.keys, timer)
        self._spans.begin(message)
        if message.experiment.zero_io:
            self._zero_io.add(message.plan)
            everything = [True] * len(message.keys)
            self._reply(client, ShareRead(message.plan, everything, {}, 0.0, 0.0))
            return
        sizes = dict(zip(message.keys, message.sizes, strict=True)) if message.sizes else NO_SIZES
        self._store.admit(message.plan, message.keys, now + message.deadline_s, now, sizes)

    def _are_sizes(self, message: ReadShare) -> bool:
        if not message.sizes:
            return True
        fits = 0 < min(message.sizes) and max(message.sizes) <= self._store.pool.block_bytes
        return fits and len(message.sizes) == len(message.keys)

    def _reply_nothing(self, client: bytes, message: ReadShare) -> None:
        nothing = [False] * len(message.keys)
        self._reply(client, ShareRead(message.plan, nothing, {}, 0.0, 0.0))

    def release(self, plan: PlanId) -> None:
        """Nobody needs the plan's blocks, except jobs, which keep theirs themselves."""
        share = self._shares.pop(plan, None)
        if share is not None:
            share.release.cancel()
            self._zero_io.discard(plan)
            self._spans.forget(plan)
            self._store.release(plan)

    def release_before(self, first: PlanId) -> None:
        """Another gateway's plans begin with this one: nobody needs older ones."""
        older = [plan for plan in self._shares if plan < first]
        for plan in older:
            self.release(plan)
        if older:
            log.warning("plans of a former gateway released plans=%d", len(older))

    def is_zero_io(self, plan: PlanId) -> bool:
        """Is the plan one of a measurement without I/O?"""
        return plan in self._zero_io

    def settled(self, event: ShareSettled) -> None:
        """The store is done with a share: answer."""
        log.info(
            "share read plan=%d blocks=%d in_dram=%d read_bytes=%d queue_s=%.4f read_s=%.4f",
            event.plan,
            len(event.in_dram),
            sum(event.in_dram),
            sum(event.read_bytes.values()),
            event.queue_s,
            event.read_s,
        )
        self._spans.read(event)
        share = self._shares.get(event.plan)
        if share is not None:
            in_dram = self._deliverable(share.keys, event.in_dram)
            answer = ShareRead(event.plan, in_dram, event.read_bytes, event.queue_s, event.read_s)
            self._reply(share.client, answer)

    def _deliverable(self, keys: list[BlockKey], in_dram: list[bool]) -> list[bool]:
        """Blocks whose heads are split otherwise than any engine needs are misses."""
        pool = self._store.pool
        deliverable = [
            here and self._can_deliver(pool.label(key).layout)
            for key, here in zip(keys, in_dram, strict=True)
        ]
        if deliverable != in_dram:
            log.warning(
                "%d blocks were stored by engines of another tensor parallel size, by which "
                "the heads of the present ones do not divide: they are computed again",
                sum(in_dram) - sum(deliverable),
            )
        return deliverable

    def _overdue(self, plan: PlanId) -> None:
        log.warning("plan released at its deadline plan=%d", plan)
        self._poll_store()  # a share that is still being read settles first
        self.release(plan)
