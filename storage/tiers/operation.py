"""One block's read, write or removal on its way through a tier's threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import Enum

import numpy as np

from common.block import UNLABELLED, BlockKey, BlockLabel
from storage.block_format import Buffer
from storage.tiers.contract import BlockCorrupt


class Kind(Enum):
    """What is done to the block."""

    READ = 1
    WRITE = 2
    REMOVE = 3


class Operation:
    """Made and ended by the tier's owner; carried out by one I/O thread."""

    def __init__(
        self,
        kind: Kind,
        key: BlockKey,
        buffer: memoryview | None = None,
        label: BlockLabel = UNLABELLED,
    ) -> None:
        self.kind = kind
        self.key = key
        self._buffer = buffer
        self.nbytes = buffer.nbytes if buffer is not None else 0
        self.label = label
        self.place: int | None = None
        """Where the block lies, or is to lie: a number that the tier gives it."""
        self.group = 0
        """Of the block's owner, where the tier counts by owners."""
        self.sequence = 0
        """Order of the writes, where the tier numbers them."""
        self.written_ms = 0
        self.submitted_s = time.monotonic()
        self.started_s: float | None = None
        self.seconds = 0.0
        self.error: Exception | None = None
        self._given_up = False
        self._finished = False
        self._lock = threading.Lock()

    def run(self, work: Callable[[Operation], None]) -> None:
        """Have ``work`` done in the calling thread; how long it took and its error are noted."""
        start = self.started_s = time.monotonic()
        try:
            work(self)
        except Exception as error:  # whatever a file system raises ends this block alone
            self.error = error
        self.seconds = time.monotonic() - start

    @property
    def buffer(self) -> memoryview:
        """The caller's memory; only for tiers that never give an operation up."""
        assert self._buffer is not None
        return self._buffer

    @property
    def is_given_up(self) -> bool:
        """Nobody waits for it any more."""
        return self._given_up

    def deliver(self, payload: Buffer) -> None:
        """Copy what was read into the caller's buffer, unless the caller was told to stop
        waiting: then the buffer may already be someone else's.

        Raises BlockCorrupt if the sizes differ.
        """
        if len(payload) != self.nbytes:
            raise BlockCorrupt(f"payload of {len(payload)} bytes, expected {self.nbytes}")
        with self._lock:
            if not self._given_up:
                # numpy's copy releases the GIL
                np.copyto(np.frombuffer(self.buffer, np.uint8), np.frombuffer(payload, np.uint8))
                self._finished = True

    def private_payload(self) -> bytes:
        """A copy of the payload to write, which outlives the caller's buffer.

        Raises TimeoutError if the caller was told to stop waiting.
        """
        with self._lock:
            if self._given_up:
                raise TimeoutError("given up before it began")
            return bytes(self.buffer)

    def give_up(self) -> bool:
        """From now on the caller's buffer is not touched; False if it was filled already."""
        with self._lock:
            self._given_up = not self._finished
            return self._given_up
