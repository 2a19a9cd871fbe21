"""Transfers between DRAM slots and an engine's KV memory, layer by layer.

A job moves some blocks to an engine (a delivery) or from it (a pull). Worker threads take
the most urgent job's *next layer*, so a prefill engine's delivery overtakes a decode
engine's between two layers. After each layer of a delivery has completed, its word on the
engine's completion board is written.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from common.block import BlockLayout
from common.ids import NO_PLAN, JobId, PlanId
from common.messages import FAILED, board_word
from common.rate import RateMeter
from transfer.agent.heads import OtherShards, Staging
from transfer.credits import CreditWord
from transfer.mooncake import BYTES_PER_BATCH, PeerSuspended, TransferFailed, TransferPeer
from transfer.pacing.pacer import IN_TIME, SAMPLE_S, Order, Pacer
from transfer.ranges import Addresses, layer_ranges

log = logging.getLogger(__name__)

_WORD_BYTES = 8

CREDIT_POLL_S = 0.0002
"""Between two looks at the credits that engines have written: a fraction of a layer's time."""
_AT_ONCE = -1
"""Plan number that precedes all others: of jobs that only have to end."""


class QueueFull(Exception):
    """More jobs than the queue holds: this one was not taken."""


class JobCancelled(Exception):
    """Nobody wants the job's bytes any more."""


class DeadlinePassed(Exception):
    """The job did not complete in time."""


# ---- jobs -------------------------------------------------------------------------------


@dataclass(eq=False)
class TransferJob:
    """One rank's shards of blocks, which are at addresses ``slots`` (shape (n,)), to or from
    its ``pages`` (shape (n,)). ``layout``: of a shard.

    ``ended`` is called once, in the loop's thread, with None or the reason; none of the
    job's calls is running then. After :class:`TransferFailed` bytes may still land.
    """

    job: JobId
    session_id: str
    layout: BlockLayout
    kv_addresses: Addresses
    slots: Addresses
    pages: Addresses
    deadline: float
    """On the monotonic clock."""
    ended: Callable[[Exception | None], None]
    others: Sequence[OtherShards] = ()
    """Blocks to deliver whose shards are not those of the engine's ranks."""
    is_read: bool = False
    """True for a pull."""
    urgent: bool = False
    plan: PlanId = NO_PLAN
    board_address: int = 0
    """0: no completion words."""
    credit: CreditWord | None = None
    """Of an engine with a layer window; None: every layer has a place of its own."""
    first_position: int = -1
    """Of layer 0 in that window."""
    stop_reason: Exception | None = None
    """Set: nothing more is transferred, and the job ends with this."""
    layers_done: int = 0
    scratch: int = -1
    """Its word in the queue's scratch memory."""
    order: Order = (False, 0, 0)

    @property
    def layer_nbytes(self) -> int:
        """Bytes of one layer."""
        pages = len(self.pages) + sum(len(blocks.pages) for blocks in self.others)
        return self.layout.layer_bytes * pages

    @property
    def nbytes(self) -> int:
        """Bytes transferred so far."""
        return self.layers_done * self.layer_nbytes

    @property
    def has_room(self) -> bool:
        """Whether the engine's memory is free for the next layer."""
        return self.credit is None or self.credit.allows(self.first_position + self.layers_done)

    def check(self) -> None:
        """Raise if the job should stop."""
        if self.stop_reason is not None:
            raise self.stop_reason
        if time.monotonic() > self.deadline:
            raise DeadlinePassed("deadline passed")


class TransferQueue:
    """Runs jobs, at most ``jobs_max`` at once, in ``threads`` worker threads.

    ``post`` hands a call over to the loop's thread. One engine never has all the workers
    (unless there is only one), so that a hung engine does not stop the others.
    """

    def __init__(
        self,
        peer: TransferPeer,
        name: str,
        threads: int,
        jobs_max: int,
        post: Callable[[Callable[[], None]], None],
        pacer_towards: Callable[[str], Pacer | None] = lambda session_id: None,
    ) -> None:
        self._peer = peer
        self._pacer_towards = pacer_towards
        self._post = post
        self._words = np.zeros(jobs_max, np.uint64)
        peer.register(int(self._words.ctypes.data), self._words.nbytes)
        self._free_words = list(range(jobs_max))
        self._workers_per_peer = max(1, threads - 1)
        self._condition = threading.Condition()
        self._jobs: set[TransferJob] = set()
        self._waiting: defaultdict[str, list[tuple[Order, TransferJob]]] = defaultdict(list)
        """A heap for each engine."""
        self._blocked: list[TransferJob] = []
        """Their engines have no room for the next layer yet."""
        self._has_poller = False
        self._running: defaultdict[str, int] = defaultdict(int)
        self._submitted = 0
        self._queue_bytes = 0
        self._rate = RateMeter()
        self._closed = False
        self._own = threading.local()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    # ---- any thread ----

    def submit(self, job: TransferJob) -> None:
        """Begin a job as soon as its turn comes; raises :class:`QueueFull`."""
        with self._condition:
            if self._closed or not self._free_words:
                raise QueueFull(f"{len(self._jobs)} jobs are queued")
            job.scratch = self._free_words.pop()
            self._submitted += 1
            is_dead = job.stop_reason is not None
            plan = _AT_ONCE if is_dead else job.plan
            job.order = (not (job.urgent or is_dead), plan, self._submitted)
            self._jobs.add(job)
            self._queue_bytes += self._left_bytes(job)
            self._wait_turn(job)

    def cancel(self, job: TransferJob) -> None:
        """Stop before the next batch; the job ends with :class:`JobCancelled`."""
        with self._condition:
            job.stop_reason = JobCancelled("cancelled")
            self._hurry(job)

    def expire(self) -> None:
        """End queued jobs whose deadline has passed, however busy the queue is."""
        now = time.monotonic()
        with self._condition:
            for job in self._jobs:
                if now > job.deadline:
                    self._hurry(job)

    def close(self, timeout_s: float) -> None:
        """Cancel everything and wait for the workers up to ``timeout_s``."""
        with self._condition:
            self._closed = True
            for job in self._jobs:
                job.stop_reason = JobCancelled("the agent ends")
            self._condition.notify_all()
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def __len__(self) -> int:
        return len(self._jobs)

    def needed_rate(self, now: float, counts: Callable[[str], bool]) -> float:
        """Bytes a second with which the oldest plan's jobs are done in time, and those of jobs
        that go before them, as its deadline is ``now``; of peers that ``counts`` names."""
        with self._condition:
            open_jobs = [job for job in self._jobs if job.stop_reason is None]
            jobs = [job for job in open_jobs if counts(job.session_id)]
            if not jobs:
                return 0.0
            oldest = min(job.plan for job in jobs)
            own = [job for job in jobs if job.plan == oldest]
            last = max(job.order for job in own)
            left_bytes = sum(self._left_bytes(job) for job in jobs if job.order <= last)
        left_s = min(job.deadline for job in own) - now
        return left_bytes / max(SAMPLE_S, left_s * IN_TIME)

    def load(self) -> tuple[int, float]:
        """Bytes of open jobs not transferred yet; bytes a second while there were any."""
        with self._condition:
            return self._queue_bytes, self._rate.bytes_per_s

    # ---- under the condition ----

    @staticmethod
    def _left_bytes(job: TransferJob) -> int:
        return (job.layout.num_layers - job.layers_done) * job.layer_nbytes

    def _wait_turn(self, job: TransferJob) -> None:
        if not (job.has_room or job.order[1] == _AT_ONCE):
            self._blocked.append(job)
            self._condition.notify()
            return
        heapq.heappush(self._waiting[job.session_id], (job.order, job))
        self._condition.notify()

    def _hurry(self, job: TransferJob) -> None:
        """A job that will not transfer anything costs no time: let it end now."""
        waiting = self._waiting.get(job.session_id, [])
        is_waiting, is_blocked = (job.order, job) in waiting, job in self._blocked
        if is_waiting:
            waiting.remove((job.order, job))
            heapq.heapify(waiting)
        if is_blocked:
            self._blocked.remove(job)
        if is_waiting or is_blocked:
            job.order = (False, _AT_ONCE, job.order[2])
            self._wait_turn(job)

    def _unblock(self) -> None:
        """Let those have their turn for whose next layer there is room by now."""
        for job in [job for job in self._blocked if job.has_room]:
            self._blocked.remove(job)
            self._wait_turn(job)

    def _rest_a_while(self) -> None:
        """Until there is something to do. Credits come without a notification, so one worker
        looks for them."""
        is_poller = bool(self._blocked) and not self._has_poller
        self._has_poller |= is_poller
        self._condition.wait(CREDIT_POLL_S if is_poller else None)
        if is_poller:
            self._has_poller = False

    def _next(self) -> TransferJob | None:
        """The most urgent job whose engine may have one more worker."""
        best: list[tuple[Order, TransferJob]] | None = None
        for session_id, waiting in self._waiting.items():
            is_free = self._running[session_id] < self._workers_per_peer
            if waiting and is_free and (best is None or waiting[0][0] < best[0][0]):
                best = waiting
        if best is None:
            return None
        job = heapq.heappop(best)[1]
        if not best:
            del self._waiting[job.session_id]
        self._running[job.session_id] += 1
        return job

    def _rest(self, job: TransferJob) -> None:
        """The worker is done with this job for now."""
        self._running[job.session_id] -= 1
        if not self._running[job.session_id]:
            del self._running[job.session_id]
        self._condition.notify()

    # ---- worker threads ----

    def _work(self) -> None:
        while (job := self._take()) is not None:
            before_bytes = job.nbytes
            error = self._step(job)
            is_done = error is not None or job.layers_done == job.layout.num_layers
            if error is not None and job.board_address:
                error = self._say_failed(job, error)
            with self._condition:
                self._rest(job)
                done_bytes = job.nbytes - before_bytes
                self._queue_bytes -= done_bytes
                if is_done:
                    self._queue_bytes -= self._left_bytes(job)
                self._rate.note(time.monotonic(), done_bytes, self._queue_bytes > 0)
                if not is_done:
                    self._wait_turn(job)
                    continue
                self._jobs.discard(job)
                self._free_words.append(job.scratch)
            self._end(job, error)

    def _take(self) -> TransferJob | None:
        with self._condition:
            while not self._closed:
                self._unblock()
                job = self._next()
                if job is not None:
                    self._rate.note(time.monotonic(), 0, self._queue_bytes > 0)
                    if self._blocked:
                        self._condition.notify()  # another worker looks for credits
                    return job
                self._rest_a_while()
        return None

    def _step(self, job: TransferJob) -> Exception | None:
        """Transfer one layer; returns what ended the job, if anything did."""
        try:
            job.check()
            transfer = self._peer.read if job.is_read else self._peer.write
            before_batch, batch_bytes = self._pace(job)
            for ranges in self._layer(job):
                transfer(job.session_id, *ranges, before_batch, batch_bytes)
            job.layers_done += 1
            if job.board_address:
                self._write_word(job, job.layers_done)
        except Exception as error:  # whatever it is, it ends this job and reaches its owner
            return error
        return None

    def _pace(self, job: TransferJob) -> tuple[Callable[[int], None], int]:
        """What runs before each batch, with its bytes; and how many bytes it has at most."""
        # What is read is sent by another process.
        pacer = None if job.is_read else self._pacer_towards(job.session_id)
        if pacer is None:
            return lambda nbytes: job.check(), BYTES_PER_BATCH
        return partial(pacer.wait, job.order, job.check), pacer.batch_bytes

    def _layer(self, job: TransferJob) -> Iterator[tuple[Addresses, Addresses, Addresses]]:
        layer = job.layers_done
        if len(job.pages):
            yield layer_ranges(job.layout, job.kv_addresses, layer, job.slots, job.pages)
        for blocks in job.others:
            if not hasattr(self._own, "staging"):
                page_bytes_max = max(blocks.layout.component_bytes)
                self._own.staging = Staging(self._peer.register, page_bytes_max)
            yield from self._own.staging.ranges(blocks, job.kv_addresses, layer)

    def _write_word(self, job: TransferJob, code: int) -> None:
        self._words[job.scratch] = board_word(job.job, code)
        source = int(self._words.ctypes.data) + job.scratch * _WORD_BYTES
        word = np.array([[source], [job.board_address], [_WORD_BYTES]], np.int64)
        self._peer.write(job.session_id, *word)

    def _say_failed(self, job: TransferJob, error: Exception) -> Exception:
        """Best effort: the engine is told by message as well. Returns what ends the job:
        ``error``, unless the word itself may still land."""
        try:
            if isinstance(error, TransferFailed):
                self._peer.forgive(job.session_id)
            self._write_word(job, FAILED)
        except PeerSuspended:
            log.debug("board not written job=%d", job.job)
        except TransferFailed as also:
            return error if isinstance(error, TransferFailed) else also
        return error

    def _end(self, job: TransferJob, error: Exception | None) -> None:
        try:
            self._post(lambda: job.ended(error))
        except RuntimeError:
            log.debug("loop closed before the end of job=%d", job.job)
