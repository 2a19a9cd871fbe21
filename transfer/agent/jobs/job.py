"""A job: its transfers, one for each rank of the engine, end as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from transfer.agent.jobs.transfer import Ended, JobCancelled, QueueFull, Transfer
from transfer.agent.jobs.transfer_queue import TransferQueue
from transfer.mooncake import TransferFailed


class Job:
    """Lives in the agent's loop. ``ended`` is called once, when no transfer runs any more; the
    first one that fails stops the others."""

    def __init__(self, queue: TransferQueue, ended: Ended) -> None:
        self._queue = queue
        self._ended = ended
        self._transfers: list[Transfer] = []
        self._open: set[int] = set()
        self._error: Exception | None = None

    def submit(self, make_transfers: Sequence[Callable[[Ended], Transfer]]) -> None:
        """Queue the transfers, each made with what it calls at its end."""
        try:
            self._transfers = [make(partial(self._end, i)) for i, make in enumerate(make_transfers)]
        except Exception as error:  # none is under way: whatever it is, the owner hears of an end
            self._ended(error)
            return
        self._open = set(range(len(self._transfers)))
        for index, transfer in enumerate(self._transfers):
            try:
                self._queue.submit(transfer)
            except QueueFull as error:
                self._end(index, error)

    @property
    def nbytes(self) -> int:
        """Transferred so far."""
        return sum(transfer.nbytes for transfer in self._transfers)

    def cancel(self) -> None:
        """Stop what is queued or under way."""
        for index in list(self._open):
            self._queue.cancel(self._transfers[index])

    def _end(self, index: int, error: Exception | None) -> None:
        self._open.discard(index)
        is_first = error is not None and self._error is None
        # Bytes of a failed transfer may still land: its error is the one that counts.
        if is_first or isinstance(error, TransferFailed):
            self._error = error
        if not self._open:
            self._ended(self._error)
        elif is_first and not isinstance(error, JobCancelled):
            self.cancel()
