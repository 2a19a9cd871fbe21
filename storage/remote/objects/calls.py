"""Calls to an object store: tried again with jitter, bounded in time, reads hedged."""

from __future__ import annotations

import itertools
import logging
import queue
import random
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from storage.block_format import Buffer
from storage.remote.objects.object_store import ObjectStore, RemoteUnusable, StoredObject
from storage.tiers.contract import BlockCorrupt, BlockMissing
from storage.tiers.io_threads import IoThreads

logger = logging.getLogger(__name__)

ATTEMPTS_MAX = 6
BACKOFF_S = 0.05
"""Upper bound of the first pause; it doubles, and each pause is a random part of its bound."""
BACKOFF_S_MAX = 2.0

T = TypeVar("T")


class CalledOff(Exception):
    """Raised by the parts of an upload that nobody waits for any more."""


_PERMANENT = (
    BlockCorrupt,
    BlockMissing,
    CalledOff,
    FileExistsError,
    FileNotFoundError,
    NotImplementedError,
    PermissionError,
    RemoteUnusable,
    TypeError,
    ValueError,
)
"""Another attempt would fail alike."""


class RemoteCalls:
    """An object store whose passing errors are not seen.

    A call is tried up to ``ATTEMPTS_MAX`` times, the last time before ``timeout_s`` have gone.
    ``hedge_after_s``: a read that has not ended by then is asked for a second time, and the
    first answer counts; 0 switches that off.
    """

    def __init__(
        self,
        store: ObjectStore,
        timeout_s: float,
        hedge_after_s: float = 0.0,
        threads: int = 16,
    ) -> None:
        self._store = store
        self._timeout_s = timeout_s
        self._hedge_after_s = hedge_after_s
        self._hedgers = IoThreads("remote-hedge", 2 * threads if hedge_after_s else 0)
        self._retries, self._hedges = itertools.count(), itertools.count()
        self.retries_total = 0
        self.hedged_reads_total = 0

    def close(self, timeout_s: float) -> None:
        self._hedgers.close(timeout_s)

    def read(self, path: str, start: int, nbytes: int) -> Buffer:
        """See :class:`storage.remote.objects.object_store.ObjectStore`; so are the others."""

        def attempt() -> Buffer:
            return self._store.read(path, start, nbytes)

        return self._persist(lambda: self._hedged(attempt), f"read of {path}")

    def write(self, path: str, parts: Callable[[], Iterable[Buffer]]) -> None:
        """``parts`` is called at every attempt."""
        self._persist(lambda: self._store.write(path, parts()), f"write of {path}", bounded=False)

    def create(self, path: str, data: bytes) -> bool:
        return self._persist(lambda: self._store.create(path, data), f"creation of {path}")

    def list(self, folder: str) -> list[StoredObject]:
        return self._persist(lambda: self._store.list(folder), f"listing of {folder}")

    def delete(self, path: str) -> None:
        self._persist(lambda: self._store.delete(path), f"removal of {path}")

    def _persist(self, attempt: Callable[[], T], what: str, bounded: bool = True) -> T:
        """``bounded=False``: only the attempts are, as each may take long."""
        end = time.monotonic() + self._timeout_s
        for number in range(1, ATTEMPTS_MAX + 1):
            try:
                return attempt()
            except _PERMANENT:
                raise
            except Exception as error:  # of any store's library
                pause_s = random.uniform(0, min(BACKOFF_S_MAX, BACKOFF_S * 2**number))
                is_late = bounded and time.monotonic() + pause_s > end
                if number == ATTEMPTS_MAX or is_late:
                    raise
                logger.debug("%s failed, attempt %d: %s", what, number, error)
                self.retries_total = next(self._retries) + 1
                time.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    def _hedged(self, attempt: Callable[[], Buffer]) -> Buffer:
        if not self._hedge_after_s:
            return attempt()
        answers: queue.SimpleQueue[Buffer | Exception] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(attempt())
            except Exception as error:  # handed to the thread that waits
                answers.put(error)

        self._hedgers.submit(ask)
        try:
            first = answers.get(timeout=self._hedge_after_s)
        except queue.Empty:
            self.hedged_reads_total = next(self._hedges) + 1
            self._hedgers.submit(ask)
            first = self._answer(answers)
            if isinstance(first, Exception):  # perhaps the other one does better
                first = self._answer(answers)
        if isinstance(first, Exception):
            raise first
        return first

    def _answer(self, answers: queue.SimpleQueue[Buffer | Exception]) -> Buffer | Exception:
        try:
            return answers.get(timeout=self._timeout_s)
        except queue.Empty:
            return TimeoutError(f"no answer within {self._timeout_s:g} s")
