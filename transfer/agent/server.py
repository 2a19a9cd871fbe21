"""The agent: what it does with each message, and what it tells unasked.

Owns the node's registered host memory and its storage tiers. Reads blocks for the
gateway's plans, delivers them into engines' KV memory, pulls new ones out of it, and
announces what it holds. One asyncio loop decides everything; storage and transfers run in
threads and report back to it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import msgspec

from common.block import BlockKey, BlockLayout
from common.ids import NO_JOB, Incarnation
from common.messages import (
    AgentHello,
    AgentStatus,
    CancelJob,
    Deliver,
    JobEnded,
    MalformedMessage,
    Message,
    Ping,
    PullBlocks,
    PullEnded,
    ReadShare,
    RegisterEngine,
    ReleasePlan,
    ShareRead,
    Subscribe,
    UnknownEngine,
    decode,
)
from common.process_settings import incarnation
from storage.remote.tier import RemoteTier
from storage.slot_pool import SlotPool
from storage.ssd.tier import SsdTier
from storage.store_events import HoldingChanged, StoreStats
from storage.tiered_store import TieredStore
from storage.tiers.contract import Tier, Wake
from transfer.agent.announcer import Announcer
from transfer.agent.config import AgentConfig
from transfer.agent.deliver_jobs import DeliverJobs
from transfer.agent.delivery import TransferQueue
from transfer.agent.engines import BadRegistration, Engine, Engines
from transfer.agent.metrics import AgentCounters, Samples, store_samples
from transfer.agent.pull_jobs import PullJobs
from transfer.agent.router import Router
from transfer.agent.share_jobs import ShareJobs
from transfer.credits import CreditBoard
from transfer.memory import HostMemory
from transfer.mooncake import TransferFailed, TransferPeer
from transfer.pacing import nics
from transfer.pacing.nic_pacing import MovedBytes, NicBook, Pacing, pacer_samples
from transfer.pacing.pacer import read_pace
from transfer.traffic.host import keeps_apart

log = logging.getLogger(__name__)

TICK_S = 0.2
JOBS_MAX = 4096
"""Deliveries, and likewise pulls, that wait or run."""
PULL_THREADS = 2
DEADLINE_MAX_S = 3600.0
QUEUE_STOP_S = 0.5


class _Serving(msgspec.Struct):
    """What exists as soon as the first engine has told the size of a block."""

    store: TieredStore
    shares: ShareJobs
    deliveries: DeliverJobs
    pulls: PullJobs


class Agent:
    """Built and used inside a running loop; start errors are those of its parts."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._incarnation = incarnation() or Incarnation(int(time.time() * 1000))
        self._counters = AgentCounters()
        self._serving: _Serving | None = None
        self._poll_due = False
        self._router = Router(config.control)
        self._announcer = Announcer(self._incarnation, self._router.send)
        self._memory = HostMemory(config.dram_bytes)
        self._peer = _start_peer(config)
        self._peer.register(self._memory.address, self._memory.size_bytes)
        self._engines = Engines(CreditBoard(self._peer.register))
        self._tiers = _open_tiers(config, self._wake)
        self._nics = NicBook(self._peer.is_local, is_rdma=config.protocol == "rdma")
        self._moved = MovedBytes(self._nics, "agent")
        self._pacing = Pacing(
            *(read_pace(config.pace), self._nics, self._needed_rate),
            *(config.nic_bytes_per_s, config.rdma_devices),
            partial(keeps_apart, group=config.cgroup),
        )
        self._deliver_queue = self._queue("deliver", config.deliver_threads)
        self._pull_queue = self._queue("pull", PULL_THREADS)
        log.info(
            "agent up name=%s incarnation=%d session=%s control=%s dram_bytes=%d page_bytes=%d",
            *(config.name, self._incarnation, self._peer.session_id, config.control),
            *(self._memory.size_bytes, self._memory.page_bytes),
        )

    def _queue(self, name: str, threads: int) -> TransferQueue:
        def post(call: Callable[[], None]) -> None:
            self._loop.call_soon_threadsafe(call)

        return TransferQueue(self._peer, name, threads, JOBS_MAX, post, self._pacing.towards)

    def _needed_rate(self, now: float, counts: Callable[[str], bool]) -> float:
        return self._deliver_queue.needed_rate(now, counts)

    # ---- the loop -----------------------------------------------------------------------

    async def serve(self) -> None:
        """Until cancelled: one message after the other, whatever it is."""
        ticker = asyncio.create_task(self._tick())
        try:
            while True:
                sender, frame = await self._router.receive()
                try:
                    self._handle(sender, decode(frame))
                except MalformedMessage as error:
                    self._drop(str(error))
                except Exception:
                    log.exception("message could not be handled")
                    self._drop("see above")
                self._wake()
                await asyncio.sleep(0)  # let the threads' reports in, however many messages come
        finally:
            ticker.cancel()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self._poll()
                self._deliver_queue.expire()
                self._pull_queue.expire()
                if self._serving is not None:
                    self._serving.pulls.release_quarantine()
                self._announcer.status(self._status())
            except Exception:
                log.exception("tick failed")

    def close(self) -> None:
        """Give everything back; takes seconds only if a disk or peer hangs."""
        self._deliver_queue.close(QUEUE_STOP_S)
        self._pull_queue.close(QUEUE_STOP_S)
        for tier in self._tiers:
            if tier is not None:
                tier.close()
        self._router.close()

    def _drop(self, reason: str) -> None:
        self._counters.malformed_total += 1
        log.warning("message dropped reason=%s", reason)

    # ---- messages -----------------------------------------------------------------------

    def _handle(self, sender: bytes, message: Message) -> None:
        match message:
            case Ping():
                self._greet(sender)
                engine = self._engines.find(sender)
                if engine is not None and self._serving is not None:
                    self._serving.deliveries.heard(engine)
            case Subscribe():
                self._greet(sender)
                holdings = self._serving.store.holdings() if self._serving else []
                self._announcer.subscribe(sender, holdings)
            case RegisterEngine():
                self._register(sender, message)
                self._greet(sender)
            case ReadShare():
                self._read_share(sender, message)
            case ReleasePlan():
                if self._serving is not None:
                    self._serving.shares.release(message.plan)
            case Deliver() | PullBlocks() | CancelJob():
                self._order(sender, message)
            case _:
                raise MalformedMessage(f"{type(message).__name__} is not for agents")

    def _greet(self, client: bytes) -> None:
        engine = self._engines.find(client)
        credit_address = engine.ranks[0].credit.address if engine is not None else 0
        hello = AgentHello(
            self._config.name, self._incarnation, self._peer.session_id, credit_address
        )
        self._router.send(client, hello)

    def _register(self, sender: bytes, message: RegisterEngine) -> None:
        layout = message.namespace.layout
        serving = self._serving or self._open_store(message.engine, layout)
        if serving is None:
            return
        if layout.block_bytes != serving.store.pool.block_bytes:
            log.error(
                "engine refused engine=%s block_bytes=%d: this agent's slots are for %d bytes",
                *(message.engine, layout.block_bytes, serving.store.pool.block_bytes),
            )
            return
        try:
            engine, replaced = self._engines.register(sender, message)
        except BadRegistration as error:
            raise MalformedMessage(str(error)) from error
        if engine is None:
            log.info("old incarnation ignored engine=%s", message.engine)
            return
        if replaced is not None:
            replaced.cancel_jobs()
            serving.deliveries.engine_gone(replaced)
            serving.pulls.release_quarantine()
        for rank in engine.ranks:
            self._peer.forgive(rank.session_id)
        threading.Thread(target=self._meet, args=(engine,), daemon=True).start()
        while engine.unsent:
            self._reply(engine, engine.unsent.popleft())
        log.info(
            "engine registered engine=%s incarnation=%d shards=%d sessions=%s",
            *(engine.name, engine.incarnation, engine.layout.shards),
            [rank.session_id for rank in engine.ranks],
        )

    def _meet(self, engine: Engine) -> None:
        for rank in engine.ranks:
            try:
                self._peer.meet(rank.session_id, int(rank.kv_addresses[0, 0]))
            except TransferFailed as error:
                log.warning("engine not met engine=%s error=%s", engine.name, error)

    def _read_share(self, sender: bytes, message: ReadShare) -> None:
        if self._serving is None:
            nothing = [False] * len(message.keys)
            self._router.send(sender, ShareRead(message.plan, nothing, {}, 0.0, 0.0))
        else:
            self._serving.shares.start(sender, _bounded(message))

    def _order(self, sender: bytes, message: Deliver | PullBlocks | CancelJob) -> None:
        engine = self._engines.find(sender)
        if engine is None or self._serving is None:
            # A job to cancel may be running here for an engine that has reconnected: it is
            # not named, so that the engine does not take it for ended.
            job = NO_JOB if isinstance(message, CancelJob) else message.job
            self._router.send(sender, UnknownEngine(self._incarnation, job))
        elif isinstance(message, CancelJob):
            if message.job in engine.jobs:
                engine.jobs[message.job].cancel()
        elif engine.first_time(message.job):
            if isinstance(message, Deliver):
                self._serving.deliveries.start(engine, _bounded(message))
            else:
                self._serving.pulls.start(engine, _bounded(message))

    def _reply(self, engine: Engine, message: JobEnded | PullEnded) -> None:
        if not engine.is_gone and not self._router.send(engine.identity, message):
            engine.unsent.append(message)

    # ---- the store ----------------------------------------------------------------------

    def _open_store(self, engine: str, layout: BlockLayout) -> _Serving | None:
        try:
            pool = SlotPool(self._memory.view, layout.block_bytes)
        except (ValueError, ZeroDivisionError) as error:
            log.error("engine refused engine=%s layout=%s: %s", engine, layout, error)
            return None
        store = TieredStore(
            *(pool, *self._tiers),
            keep_in_dram=self._config.dram_keep,
            write_policy=self._config.write_policy,
            promotion_policy=self._config.promotion_policy,
        )
        address = self._memory.address
        shares = ShareJobs(store, self._router.send, self._poll, self._engines.can_take)
        deliveries = DeliverJobs(
            queue=self._deliver_queue,
            pool=pool,
            memory_address=address,
            reply=self._reply,
            tell=self._announcer.tell,
            incarnation=self._incarnation,
            counters=self._counters,
            is_zero_io=shares.is_zero_io,
        )
        pulls = PullJobs(
            queue=self._pull_queue,
            store=store,
            memory_address=address,
            host=self._config.host,
            reply=self._reply,
            held=self._held,
            incarnation=self._incarnation,
            counters=self._counters,
        )
        self._serving = _Serving(store, shares, deliveries, pulls)
        for holding in store.holdings():
            self._announcer.note(holding)
        log.info(
            "store open block_bytes=%d slot_bytes=%d slots=%d",
            *(pool.block_bytes, pool.slot_bytes, pool.num_slots),
        )
        return self._serving

    def _held(self, keys: list[BlockKey]) -> list[bool]:
        assert self._serving is not None
        held = self._serving.store.is_resident(keys)
        for tier in self._tiers:
            if tier is not None:
                held = [a or b for a, b in zip(held, tier.contains(keys), strict=True)]
        return held

    def _wake(self) -> None:
        """From any thread: have the store polled in the loop, once however often asked."""
        if not self._poll_due:
            self._poll_due = True
            try:
                self._loop.call_soon_threadsafe(self._poll)
            except RuntimeError:
                log.debug("the loop is closed")

    def _poll(self) -> None:
        self._poll_due = False
        if self._serving is None:
            return
        for event in self._serving.store.poll(time.monotonic()):
            if isinstance(event, HoldingChanged):
                self._announcer.note(event)
            else:
                self._serving.shares.settled(event)

    # ---- status -------------------------------------------------------------------------

    def _status(self) -> AgentStatus:
        stats = self._serving.store.stats() if self._serving else StoreStats()
        return AgentStatus(
            self._incarnation,
            stats.read_queue_bytes,
            stats.read_bytes_per_s,
            *self._deliver_queue.load(),
            stats.slots,
            stats.slots_available,
            self._samples(stats),
        )

    def _samples(self, stats: StoreStats) -> Samples:
        serving = self._serving
        deliver_queue_bytes, deliver_bytes_per_s = self._deliver_queue.load()
        return {
            **self._counters.samples(),
            **store_samples(stats),
            **self._moved.samples(self._peer.moved_bytes()),
            **pacer_samples(self._pacing.pacers()),
            'dualpath:agent_jobs{kind="delivery"}': len(self._deliver_queue),
            'dualpath:agent_jobs{kind="pull"}': len(self._pull_queue),
            "dualpath:agent_deliver_queue_bytes": deliver_queue_bytes,
            "dualpath:agent_deliver_bytes_per_second": deliver_bytes_per_s,
            "dualpath:agent_landing_jobs": serving.deliveries.landing_jobs if serving else 0,
            "dualpath:agent_quarantined_slots": serving.pulls.quarantined_slots if serving else 0,
        }


def _start_peer(config: AgentConfig) -> TransferPeer:
    """With RDMA, through the NICs near the node's engine first."""
    topology: nics.Topology = {}
    if config.protocol == "rdma":  # untested: no such machine was at hand
        own = [gpu for gpu in nics.gpus() if gpu.index in config.gpus]
        usable = nics.usable(nics.rdma_nics(), config.rdma_devices)
        topology = nics.agent_topology(usable, own, nics.numa_node_count())
        log.info("NICs to use, and those to go over to: %s", topology)
    with nics.given_to_mooncake(topology):
        return TransferPeer(config.host, config.protocol, config.rdma_devices)


def _open_tiers(config: AgentConfig, wake: Wake) -> tuple[Tier | None, Tier | None]:
    """SSD and remote tier, None where switched off."""
    ssd = remote = None
    if config.ssd_dirs:
        ssd = SsdTier(
            *(config.ssd_dirs, config.ssd_bytes, wake, config.read_threads),
            *(config.ssd_min_free_bytes, config.ssd_quotas),
        )
    if config.remote_url:
        remote = RemoteTier(config.remote_url, config.remote_options, wake, config.remote)
    return ssd, remote


_Timed = TypeVar("_Timed", ReadShare, Deliver, PullBlocks)


def _bounded(message: _Timed) -> _Timed:
    """The message with a deadline between 0 and DEADLINE_MAX_S."""
    deadline_s = min(message.deadline_s, DEADLINE_MAX_S) if message.deadline_s > 0 else 0.0
    return msgspec.structs.replace(message, deadline_s=deadline_s)
