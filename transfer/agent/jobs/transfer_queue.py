"""Runs transfers between DRAM slots and engines' KV memory, layer by layer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from common.rate import RateMeter
from transfer.agent.jobs.layers import LayerMover
from transfer.agent.jobs.transfer import JobCancelled, QueueFull, Transfer
from transfer.agent.jobs.turns import Turns
from transfer.mooncake import TransferPeer
from transfer.pacing.pacer import IN_TIME, SAMPLE_S, Pacer

log = logging.getLogger(__name__)

CREDIT_POLL_S = 0.0002
"""Between two looks at the credits that engines have written: a fraction of a layer's time."""


class TransferQueue:
    """At most ``transfers_max`` at once, in ``threads`` worker threads, each of which takes the
    most urgent one's *next layer*. Thread-safe.

    ``post`` hands a call over to the loop's thread. One engine never has all the workers
    (unless there is only one).
    """

    def __init__(
        self,
        peer: TransferPeer,
        name: str,
        threads: int,
        transfers_max: int,
        post: Callable[[Callable[[], None]], None],
        pacer_towards: Callable[[str], Pacer | None] = lambda session_id: None,
    ) -> None:
        self._mover = LayerMover(peer, transfers_max, pacer_towards)
        self._post = post
        self._free_words = list(range(transfers_max))
        self._condition = threading.Condition()
        self._open: set[Transfer] = set()
        self._turns = Turns(max(1, threads - 1))
        self._has_poller = False
        self._queue_bytes = 0
        self._rate = RateMeter()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    # ---- any thread ----

    def submit(self, transfer: Transfer) -> None:
        """Begin as soon as its turn comes; raises :class:`QueueFull`."""
        with self._condition:
            if self._closed or not self._free_words:
                raise QueueFull(f"{len(self._open)} transfers are queued")
            transfer.scratch = self._free_words.pop()
            self._open.add(transfer)
            self._queue_bytes += transfer.left_nbytes
            self._turns.enter(transfer)
            self._condition.notify()

    def cancel(self, transfer: Transfer) -> None:
        """Stop before the next batch; the transfer ends with :class:`JobCancelled`."""
        with self._condition:
            transfer.stop_reason = JobCancelled("cancelled")
            self._hurry(transfer)

    def expire(self) -> None:
        """End waiting transfers whose deadline has passed, however busy the queue is."""
        now = time.monotonic()
        with self._condition:
            for transfer in self._open:
                if now > transfer.deadline:
                    self._hurry(transfer)

    def close(self, timeout_s: float) -> None:
        """Cancel everything and wait for the workers up to ``timeout_s``."""
        with self._condition:
            self._closed = True
            for transfer in self._open:
                transfer.stop_reason = JobCancelled("the agent ends")
            self._condition.notify_all()
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def __len__(self) -> int:
        return len(self._open)

    def needed_rate(self, now: float, counts: Callable[[str], bool]) -> float:
        """Bytes a second with which the oldest plan's transfers are done in time, and those
        that go before them, as its deadline is ``now``; of peers that ``counts`` names."""
        with self._condition:
            wanted = [each for each in self._open if each.stop_reason is None]
            wanted = [each for each in wanted if counts(each.session_id)]
            if not wanted:
                return 0.0
            oldest = min(each.plan for each in wanted)
            own = [each for each in wanted if each.plan == oldest]
            last = max(each.precedence for each in own)
            left_bytes = sum(each.left_nbytes for each in wanted if each.precedence <= last)
        left_s = min(each.deadline for each in own) - now
        return left_bytes / max(SAMPLE_S, left_s * IN_TIME)

    def load(self) -> tuple[int, float]:
        """Bytes of open transfers not moved yet; bytes a second while there were any."""
        with self._condition:
            return self._queue_bytes, self._rate.bytes_per_s

    def _hurry(self, transfer: Transfer) -> None:
        if self._turns.hurry(transfer):
            self._condition.notify()

    # ---- worker threads ----

    def _work(self) -> None:
        while (transfer := self._take()) is not None:
            before_bytes = transfer.nbytes
            error = self._mover.move(transfer)
            is_done = error is not None or transfer.layers_done == transfer.num_layers
            with self._condition:
                self._turns.leave(transfer)
                self._condition.notify()
                done_bytes = transfer.nbytes - before_bytes
                self._queue_bytes -= done_bytes
                if is_done:
                    self._queue_bytes -= transfer.left_nbytes
                self._rate.note(time.monotonic(), done_bytes, self._queue_bytes > 0)
                if not is_done:
                    self._turns.wait(transfer)
                    self._condition.notify()
                    continue
                self._open.discard(transfer)
                self._free_words.append(transfer.scratch)
            self._end(transfer, error)

    def _take(self) -> Transfer | None:
        with self._condition:
            while not self._closed:
                self._condition.notify(self._turns.call_back())
                transfer = self._turns.next()
                if transfer is not None:
                    self._rate.note(time.monotonic(), 0, self._queue_bytes > 0)
                    if self._turns.has_aside:
                        self._condition.notify()  # another worker looks for credits
                    return transfer
                self._rest_a_while()
        return None

    def _rest_a_while(self) -> None:
        """Until there is something to do. Credits come without a notification, so one worker
        looks for them."""
        is_poller = self._turns.has_aside and not self._has_poller
        self._has_poller |= is_poller
        self._condition.wait(CREDIT_POLL_S if is_poller else None)
        if is_poller:
            self._has_poller = False

    def _end(self, transfer: Transfer, error: Exception | None) -> None:
        try:
            self._post(lambda: transfer.ended(error))
        except RuntimeError:
            log.debug("loop closed before the end of job=%d", transfer.job)
