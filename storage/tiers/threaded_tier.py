"""Tiers that move one block at a time, each in an I/O thread."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import Protocol

from storage.tiers.io_threads import Work
from storage.tiers.operation import Kind, Operation
from storage.tiers.queued_tier import QueuedTier


class Executor(Protocol):
    """Where operations run: IoThreads or CallerThread."""

    def submit(self, work: Work) -> None: ...


class ThreadedTier(QueuedTier):
    """Subclasses say how one block is read, written and removed, and in which threads."""

    @abstractmethod
    def _executor(self, operation: Operation) -> Executor:
        """Who runs the operation."""

    @abstractmethod
    def _load(self, operation: Operation) -> None:
        """Fill the operation's buffer, verified; raise otherwise."""

    @abstractmethod
    def _store(self, operation: Operation) -> None:
        """Store the operation's payload durably; raise otherwise (TierFull: no room)."""

    @abstractmethod
    def _remove(self, operation: Operation) -> None:
        """Delete what is stored under the operation's key, or in its place, if anything."""

    def _launch(self, operation: Operation) -> None:
        self._executor(operation).submit(lambda: self._run(operation))

    def _run(self, operation: Operation) -> None:
        """In an I/O thread."""
        start = operation.started_s = time.monotonic()
        try:
            if operation.kind is Kind.READ:
                self._load(operation)
            elif operation.kind is Kind.WRITE:
                self._store(operation)
            else:
                self._remove(operation)
        except Exception as error:  # whatever a file system raises ends this block alone
            operation.error = error
        operation.seconds = time.monotonic() - start
        self._hand_back(operation)
