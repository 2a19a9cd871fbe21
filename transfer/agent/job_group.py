"""The transfer jobs of one order, one for each rank of an engine: they end as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from transfer.agent.delivery import JobCancelled, QueueFull, TransferJob, TransferQueue
from transfer.mooncake import TransferFailed

Ended = Callable[[Exception | None], None]


class JobGroup:
    """Lives in the agent's loop. ``ended`` is called once, when no job runs any more, with
    None or the reason; the first job that fails stops the others."""

    def __init__(self, queue: TransferQueue, ended: Ended) -> None:
        self._queue = queue
        self._ended = ended
        self._jobs: list[TransferJob] = []
        self._open: set[int] = set()
        self._error: Exception | None = None

    def submit(self, make_jobs: Sequence[Callable[[Ended], TransferJob]]) -> None:
        """Queue the jobs, each made with what it calls at its end."""
        self._jobs = [make(partial(self._end, i)) for i, make in enumerate(make_jobs)]
        self._open = set(range(len(self._jobs)))
        for index, job in enumerate(self._jobs):
            try:
                self._queue.submit(job)
            except QueueFull as error:
                self._end(index, error)

    @property
    def nbytes(self) -> int:
        """Transferred so far."""
        return sum(job.nbytes for job in self._jobs)

    def cancel(self) -> None:
        """Stop what is queued or under way."""
        for index in list(self._open):
            self._queue.cancel(self._jobs[index])

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
