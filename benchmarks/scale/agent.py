"""What an agent's Python costs for each block that it pulls and each step that it delivers.

The agent's own jobs, queues and address maths run over memory that nobody touches, towards an
engine that is made up: Mooncake is replaced by one that is done at once. What is left is what the
agent holds the GIL for; that Mooncake moves bytes meanwhile costs no GIL.
"""

from __future__ import annotations

import asyncio
import gc
import mmap
import time
from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np

from common.block import BlockKey, BlockLayout, Namespace
from common.ids import BoardSlot, Incarnation, JobId, PlanId
from common.messages.codec import decode, encode
from common.messages.from_agents import Delivered, JobEnded, PullEnded
from common.messages.from_engines import Deliver, PullBlocks, RankMemory, RegisterEngine
from common.tracing.spans import Tracer
from storage.slot_pool import SlotPool
from storage.store_options import StoreOptions
from storage.tiered_store import TieredStore
from transfer.agent.engines import Engine, Engines
from transfer.agent.jobs.deliver_jobs import DeliverJobs
from transfer.agent.jobs.pull_jobs import PullJobs
from transfer.agent.jobs.reports import Reports
from transfer.agent.jobs.transfer_queue import TransferQueue
from transfer.agent.metrics import AgentCounters
from transfer.agent.plan_spans import PlanSpans
from transfer.agent.resources import PULL_THREADS, TRANSFERS_MAX
from transfer.credits import CreditBoard
from transfer.mooncake import MooncakeEngine, TransferPeer

MLA = BlockLayout(64, 61, (64 * 576 * 2,))
"""DeepSeek-V3's latents: every rank has all of them."""
GQA = BlockLayout(64, 64, (64 * 8 * 128 * 2,) * 2)
"""Qwen2.5-32B."""
PLAN = PlanId(1 << 40)
BUFFER_BYTES = 1 << 36
"""Between two buffers of the engine that is made up."""
DEADLINE_S = 600.0
PAGES = 4096
MAP_NORESERVE = 0x4000
"""Linux; Python has no name for it. Of DRAM tiers larger than this machine, nothing is touched."""


class InstantMooncake(MooncakeEngine):
    """Whose transfers are over when they begin, and move nothing."""

    def initialize(self, host: str, metadata: str, protocol: str, devices: str, /) -> int:
        return 0

    def get_rpc_port(self) -> int:
        return 1

    def register_memory(self, address: int, length: int, /) -> int:
        return 0

    def batch_transfer_sync_write(
        self, peer: str, src: list[int], dst: list[int], lengths: list[int], /
    ) -> int:
        return 0

    def batch_transfer_sync_read(
        self, peer: str, dst: list[int], src: list[int], lengths: list[int], /
    ) -> int:
        return 0

    def batch_transfer_async_write(
        self, peer: str, src: list[int], dst: list[int], lengths: list[int], /
    ) -> int:
        return 1

    def batch_transfer_async_read(
        self, peer: str, dst: list[int], src: list[int], lengths: list[int], /
    ) -> int:
        return 1

    def get_batch_transfer_status(self, batches: list[int], /) -> int:
        return 0

    def transfer_check_status(self, batch: int, /) -> int:
        return 1


class JobCost(msgspec.Struct, frozen=True):
    """CPU seconds of one job: in the agent's loop, and in the threads that transfer."""

    loop_s: float
    threads_s: float

    @property
    def cpu_s(self) -> float:
        return self.loop_s + self.threads_s


class Bench:
    """An agent's jobs for one engine of ``ranks`` ranks. Create it inside the running loop."""

    def __init__(self, layout: BlockLayout, ranks: int, shards: int, slots: int) -> None:
        self._loop = asyncio.get_running_loop()
        peer = TransferPeer("10.0.0.1", "tcp", engine=InstantMooncake())
        slot_bytes = -(-layout.block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, slots * slot_bytes, flags=mmap.MAP_PRIVATE | MAP_NORESERVE)
        address = int(np.frombuffer(memory, np.uint8).ctypes.data)
        peer.register(address, len(memory))
        pool = SlotPool(memoryview(memory), layout.block_bytes)
        self._store = TieredStore(pool, None, None, StoreOptions())
        message = _registration(layout, ranks, shards)
        engine, _ = Engines(CreditBoard(peer.register)).register(b"e", message)
        assert engine is not None
        self._engine = engine
        self._ended: asyncio.Future[str] = self._loop.create_future()
        """Of the job that is measured: why it has failed, or empty."""
        reports = Reports(Incarnation(1), AgentCounters(), self._reply, _told)
        self._queue = TransferQueue(peer, "scale", PULL_THREADS, TRANSFERS_MAX, self._post)
        spans = PlanSpans(Tracer(), "a")
        zero_io: Callable[[PlanId], bool] = lambda plan: False  # noqa: E731
        self._deliveries = DeliverJobs(self._queue, pool, address, zero_io, reports, spans)
        self._pulls = PullJobs(
            self._queue, self._store, address, "10.0.0.1", self._store.is_resident, reports
        )
        self._next_job = 0
        self._next_key = 0

    def close(self) -> None:
        self._queue.close(5.0)

    async def pull(self, blocks: int) -> JobCost:
        """New blocks, by one message."""
        keys, pages = self._new_keys(blocks), list(range(blocks))
        frame = encode(PullBlocks(self._job(), keys, pages, DEADLINE_S))

        def start() -> None:
            message = decode(frame)
            assert isinstance(message, PullBlocks)
            self._pulls.start(self._engine, message)

        return await self._measured(start)

    async def deliver(self, keys: list[BlockKey]) -> JobCost:
        """Blocks that :meth:`bring` has put into DRAM."""
        pages = np.random.default_rng(0).permutation(PAGES)[: len(keys)].tolist()
        frame = encode(Deliver(self._job(), PLAN, keys, pages, BoardSlot(0), True, DEADLINE_S))

        def start() -> None:
            message = decode(frame)
            assert isinstance(message, Deliver)
            self._deliveries.start(self._engine, message)

        return await self._measured(start)

    async def bring(self, blocks: int) -> list[BlockKey]:
        """Have so many in DRAM, for a plan."""
        keys = self._new_keys(blocks)
        label = self._engine.pools[0].label  # of the engine's shards: none are cut or joined
        for key in self._store.reserve(keys):
            self._store.commit(key, label)
        self._store.admit(PLAN, keys, time.monotonic() + DEADLINE_S, time.monotonic())
        list(self._store.poll(time.monotonic()))
        return keys

    async def _measured(self, start: Callable[[], None]) -> JobCost:
        self._ended = self._loop.create_future()
        all_s, loop_s = time.process_time(), time.thread_time()
        start()
        error = await self._ended
        loop_s = time.thread_time() - loop_s
        all_s = time.process_time() - all_s
        if error:
            raise RuntimeError(error)
        return JobCost(loop_s, max(0.0, all_s - loop_s))

    def _post(self, call: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(call)

    def _reply(self, engine: Engine, message: JobEnded | PullEnded) -> None:
        encode(message)
        list(self._store.poll(time.monotonic()))  # what it announces
        if isinstance(message, JobEnded):
            self._ended.set_result(message.error)
        else:
            self._ended.set_result("" if all(message.held) else "blocks were not pulled")

    def _job(self) -> JobId:
        self._next_job += 1
        return JobId(self._next_job)

    def _new_keys(self, count: int) -> list[BlockKey]:
        first, self._next_key = self._next_key, self._next_key + count
        return [BlockKey(n.to_bytes(32, "big")) for n in range(first, first + count)]


def _told(message: Delivered) -> None:
    encode(message)


def _registration(layout: BlockLayout, ranks: int, shards: int) -> RegisterEngine:
    components = len(layout.component_bytes)
    table = [
        [(1 + layer * components + each) * BUFFER_BYTES for each in range(components)]
        for layer in range(layout.num_layers)
    ]
    memories = [RankMemory(f"10.0.1.1:{1000 + rank}", table, 1 << 50) for rank in range(ranks)]
    namespace = Namespace("model", "1", "bfloat16", layout)
    return RegisterEngine("e", Incarnation(1), namespace, shards, memories, PAGES, 64)


# ---- what is measured --------------------------------------------------------------------


class AgentCosts(msgspec.Struct, frozen=True):
    """CPU seconds, medians of rounds, of one kind of engine."""

    pull_block_s: float
    """Of a pull of one block, as each that decoding fills."""
    pull_turn_block_s: float
    """A block of a turn's: 7 that its prompt brings by one pull, and 3 filled one by one."""
    step_s: float
    """One layer at one rank, of a delivery of 1,000 blocks, in the threads that transfer."""
    turn_step_s: float
    """The same, of a turn's hit of 511 blocks."""
    deliver_loop_s: float
    """A delivery of a turn's hit, in the agent's loop."""


def measure(layout: BlockLayout, ranks: int, shards: int, rounds: int) -> AgentCosts:
    """Of an engine of so many ranks, whose KV heads are split into so many shards."""
    return asyncio.run(_measure(layout, ranks, shards, rounds))


async def _measure(layout: BlockLayout, ranks: int, shards: int, rounds: int) -> AgentCosts:
    bench, steps = Bench(layout, ranks, shards, slots=2048), layout.num_layers * ranks
    try:
        keys = await bench.bring(1000)
        hit = keys[:511]
        one, turn, thousand, half = [], [], [], []
        await bench.pull(1)
        for _ in range(rounds):
            gc.collect()
            one += [(await bench.pull(1)).cpu_s for _ in range(10)]
            turn.append((await bench.pull(7)).cpu_s + sum(one[-3:]))
            thousand.append(await bench.deliver(keys))
            half.append(await bench.deliver(hit))
        median = partial(np.median)
        return AgentCosts(
            pull_block_s=float(median(one)),
            pull_turn_block_s=float(median(turn)) / 10,
            step_s=float(median([cost.threads_s for cost in thousand])) / steps,
            turn_step_s=float(median([cost.threads_s for cost in half])) / steps,
            deliver_loop_s=float(median([cost.loop_s for cost in half])),
        )
    finally:
        bench.close()
