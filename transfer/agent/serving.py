"""The two states of an agent: before its first engine has told the size of a block, and after.

Both answer the same messages, so the agent need not know in which of them it is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence, Set
from functools import partial
from typing import TypeVar

import msgspec

from common.block import BlockKey
from common.ids import NO_JOB, PlanId
from common.messages.from_agents import Holding, JobEnded, PullEnded, ShareRead, UnknownEngine
from common.messages.from_engines import AskFence, CancelJob, Deliver, PullBlocks, RegisterEngine
from common.messages.from_gateway import ForgetWeights, ReadShare
from common.samples import Sample, sample
from storage.index.owners import Selector
from storage.slot_pool import SlotPool
from storage.store_events import StoreStats
from storage.store_options import StoreOptions
from storage.tiered_store import TieredStore
from storage.tiers.contract import Tier
from transfer.agent.engine_pools import object_bytes_max
from transfer.agent.engines import Engine, Engines
from transfer.agent.fences import Fences, fenced
from transfer.agent.jobs.deliver_jobs import DeliverJobs
from transfer.agent.jobs.pull_jobs import PullJobs
from transfer.agent.jobs.reports import Reports
from transfer.agent.plan_spans import PlanSpans
from transfer.agent.resources import Resources
from transfer.agent.shares import Shares
from transfer.mooncake import TransferFailed, TransferPeer

log = logging.getLogger(__name__)

DEADLINE_MAX_S = 3600.0


class Unserved:
    """No engine has come yet: none is known, there are no blocks, and no job can be open."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    def opened_for(self, message: RegisterEngine) -> Unserved | Serving:
        """The state in which the engine can be registered: the store is open, for blocks of its
        layout. This one again if they do not fit into the agent's memory."""
        block_bytes = object_bytes_max(message.namespace)
        try:
            pool = SlotPool(self._resources.memory.view, block_bytes)
        except (ValueError, ZeroDivisionError) as error:
            log.error(
                "engine refused engine=%s layout=%s: %s",
                message.engine,
                message.namespace.layout,
                error,
            )
            return self
        return Serving(self._resources, pool)

    def register(self, client: bytes, message: RegisterEngine) -> None:
        """An engine for which the store could not be opened: it stays a stranger."""

    def credit_address(self, client: bytes) -> int:
        return 0

    def keep_engines(self, names: Set[str]) -> None:
        """There is none."""

    def holdings(self) -> Sequence[Holding]:
        return ()

    def read_share(self, client: bytes, message: ReadShare) -> None:
        """Every block is a miss."""
        nothing = [False] * len(message.keys)
        self._resources.socket.send(client, ShareRead(message.plan, nothing, {}, 0.0, 0.0))

    def release(self, plan: PlanId) -> None:
        """Nothing is held for it."""

    def release_before(self, first: PlanId) -> None:
        """Nor for any."""

    def job(self, client: bytes, message: Deliver | PullBlocks | CancelJob) -> None:
        """Of a stranger."""
        self._resources.socket.send(client, _unknown(self._resources, message))

    def fence(self, client: bytes, message: AskFence) -> None:
        """A stranger registers first, and asks again."""
        self._resources.socket.send(client, _unknown(self._resources, message))

    def forget_weights(self, message: ForgetWeights) -> None:
        """What a store has of them, once it is open, goes when its turn comes."""

    def poll(self) -> None:
        """There is no store."""

    def release_quarantine(self) -> None:
        """There is none."""

    def stats(self) -> StoreStats:
        return StoreStats()

    def fence_samples(self) -> list[Sample]:
        return _fence_samples(0, 0, 0)


class Serving:
    """The store is open. Lives in the agent's loop."""

    def __init__(self, resources: Resources, pool: SlotPool) -> None:
        config, address = resources.config, resources.memory.address
        self._resources = resources
        self._engines = Engines(resources.credits)
        options = StoreOptions(
            keep_in_dram=config.experiment.dram_keep,
            write_policy=config.write_policy,
            promotion_policy=config.promotion_policy,
        )
        if resources.ssd is not None:
            resources.ssd.share_slots(pool.block_bytes)
        self._store = TieredStore(pool, resources.ssd, resources.remote, options)
        spans = PlanSpans(resources.tracer, config.name)
        self._shares = Shares(
            self._store,
            resources.socket.send,
            self.poll,
            self._engines.can_take,
            config.experiment.zero_io,
            spans,
        )
        reports = Reports(
            resources.incarnation,
            resources.counters,
            partial(_reply, resources),
            resources.announcer.tell,
        )
        self._deliveries = DeliverJobs(
            resources.deliver_queue, pool, address, self._shares.is_zero_io, reports, spans
        )
        self._pulls = PullJobs(
            resources.pull_queue,
            self._store,
            address,
            config.host,
            partial(_held, self._store, resources.tiers),
            reports,
        )
        self._fences = Fences(resources.peer, resources.post)
        for holding in self._store.holdings():
            resources.announcer.note(holding)
        log.info(
            "store open block_bytes=%d slot_bytes=%d slots=%d",
            pool.block_bytes,
            pool.slot_bytes,
            pool.num_slots,
        )

    # ---- engines ------------------------------------------------------------------------

    def opened_for(self, message: RegisterEngine) -> Serving:
        """It is open, once for all."""
        return self

    def register(self, client: bytes, message: RegisterEngine) -> None:
        """Raises :class:`~transfer.agent.engines.BadRegistration`."""
        block_bytes = object_bytes_max(message.namespace)
        if block_bytes != self._store.pool.block_bytes:
            log.error(
                "engine refused engine=%s block_bytes=%d: this agent's slots are for %d bytes",
                message.engine,
                block_bytes,
                self._store.pool.block_bytes,
            )
            return
        engine, replaced = self._engines.register(client, message)
        if engine is None:
            log.info("old incarnation ignored engine=%s", message.engine)
            return
        if replaced is not None:
            replaced.cancel_jobs()
        peer = self._resources.peer
        for rank in engine.ranks:
            peer.forgive(rank.session_id)
        threading.Thread(target=_meet, args=(peer, engine), daemon=True).start()
        while engine.unsent:
            _reply(self._resources, engine, engine.unsent.popleft())
        log.info(
            "engine registered engine=%s incarnation=%d shards=%d sessions=%s",
            engine.name,
            engine.incarnation,
            engine.layout.shards,
            [rank.session_id for rank in engine.ranks],
        )

    def keep_engines(self, names: Set[str]) -> None:
        """All others have left the cluster."""
        self._engines.keep(names)

    def credit_address(self, client: bytes) -> int:
        """Of a client's first credit word; 0 if it is no engine."""
        engine = self._engines.find(client)
        return engine.ranks[0].credit.address if engine is not None else 0

    # ---- plans and jobs -----------------------------------------------------------------

    def read_share(self, client: bytes, message: ReadShare) -> None:
        """``ShareRead`` follows."""
        self._shares.start(client, _bounded(message))

    def release(self, plan: PlanId) -> None:
        """Nobody needs its blocks any more."""
        self._shares.release(plan)

    def release_before(self, first: PlanId) -> None:
        """Likewise all plans that are older than this one."""
        self._shares.release_before(first)

    def job(self, client: bytes, message: Deliver | PullBlocks | CancelJob) -> None:
        """Start it, once, or cancel it."""
        engine = self._engines.find(client)
        if engine is None:
            self._resources.socket.send(client, _unknown(self._resources, message))
        elif isinstance(message, CancelJob):
            if message.job in engine.jobs:
                engine.jobs[message.job].cancel()
        elif engine.first_time(message.job):
            if isinstance(message, Deliver):
                self._deliveries.start(engine, _bounded(message))
            else:
                self._pulls.start(engine, _bounded(message))

    def fence(self, client: bytes, message: AskFence) -> None:
        """``Fenced`` follows when nothing that has failed is under way to the engine, and the jobs
        that it gives up are not either: one of them may have come here late, after a restart."""
        engine = self._engines.find(client)
        if engine is None:
            self._resources.socket.send(client, _unknown(self._resources, message))
            return
        for job in message.jobs:
            engine.first_time(job)  # it is not begun from now on
            if job in engine.jobs:
                engine.jobs[job].cancel()
        if any(job in engine.jobs for job in message.jobs):
            return  # asked again soon

        def passed() -> None:
            self._resources.socket.send(engine.identity, fenced(engine, message.number))

        self._fences.begin(engine, passed)

    # ---- the store ----------------------------------------------------------------------

    def holdings(self) -> Sequence[Holding]:
        """Everything held now."""
        return self._store.holdings()

    def forget_weights(self, message: ForgetWeights) -> None:
        """At once for whoever asks; their slots are free by and by."""
        log.info("weights forgotten version=%s shared=%s", message.version, message.shared)
        self._store.drop(Selector("version", message.version), message.shared)

    def poll(self) -> None:
        """Act on what the store has to tell."""
        for event in self._store.poll(time.monotonic()):
            if isinstance(event, Holding):
                self._resources.announcer.note(event)
            else:
                self._shares.settled(event)

    def release_quarantine(self) -> None:
        """Give back slots into which nothing can land any more; call a few times a second."""
        self._pulls.release_quarantine(self._fences.begin)

    def stats(self) -> StoreStats:
        return self._store.stats()

    def fence_samples(self) -> list[Sample]:
        """What failed transfers keep."""
        return _fence_samples(
            self._engines.landing_jobs, self._pulls.quarantined_slots, self._fences.passed_total
        )


def _held(store: TieredStore, tiers: Sequence[Tier], keys: list[BlockKey]) -> list[bool]:
    held = store.is_resident(keys)
    for tier in tiers:
        held = [a or b for a, b in zip(held, tier.contains(keys), strict=True)]
    return held


def _reply(resources: Resources, engine: Engine, message: JobEnded | PullEnded) -> None:
    if not engine.is_gone and not resources.socket.send(engine.identity, message):
        engine.unsent.append(message)


def _meet(peer: TransferPeer, engine: Engine) -> None:
    for rank in engine.ranks:
        try:
            peer.meet(rank.session_id, rank.some_address)
        except TransferFailed as error:
            log.warning("engine not met engine=%s error=%s", engine.name, error)


def _fence_samples(landing_jobs: int, quarantined_slots: int, passed_total: int) -> list[Sample]:
    return [
        sample("agent_landing_jobs", landing_jobs),
        sample("agent_quarantined_slots", quarantined_slots),
        sample("agent_fences_total", passed_total),
    ]


def _unknown(
    resources: Resources, message: Deliver | PullBlocks | CancelJob | AskFence
) -> UnknownEngine:
    # A job to cancel may be running here for an engine that has reconnected: it is not named,
    # so that the engine does not take it for ended.
    job = message.job if isinstance(message, Deliver | PullBlocks) else NO_JOB
    return UnknownEngine(resources.incarnation, job)


_Timed = TypeVar("_Timed", ReadShare, Deliver, PullBlocks)


def _bounded(message: _Timed) -> _Timed:
    """The message with a deadline between 0 and DEADLINE_MAX_S."""
    deadline_s = min(message.deadline_s, DEADLINE_MAX_S) if message.deadline_s > 0 else 0.0
    return msgspec.structs.replace(message, deadline_s=deadline_s)
