"""What a store keeps beside the blocks of a namespace: its witness (``engine/witness.py``), a few
KiB that say what KV the namespace stands for.

The first that is kept stays, here and in every folder and remote store that the agent uses, so
that an engine of another day or host finds it wherever it could find blocks. One that was damaged
is none: it goes, and the next engine's takes its place.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import xxhash

from storage.ssd.direct_io import sync_folder

log = logging.getLogger(__name__)

KEPT_MAX = 1024
"""Witnesses in memory, and in a folder: then the oldest goes."""
QUEUE_MAX = 1024
_PREFIX = "witness-"
_CHECKSUM_BYTES = 8


class Keeper(Protocol):
    """A place that outlasts the process. Calls block; what they raise is of any kind."""

    def read(self, namespace_digest: bytes) -> bytes:
        """Empty where there is none."""

    def create(self, namespace_digest: bytes, values: bytes) -> None:
        """Keep this one, unless there is one."""

    def remove(self, namespace_digest: bytes) -> None: ...


class FolderKeeper:
    """In an SSD tier's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, namespace_digest: bytes) -> bytes:
        try:
            return self._path(namespace_digest).read_bytes()
        except FileNotFoundError:
            return b""

    def create(self, namespace_digest: bytes, values: bytes) -> None:
        temporary = self._folder / f"{uuid.uuid4().hex}.new"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(values)
                file.flush()
                os.fsync(fd)
            os.link(temporary, self._path(namespace_digest))
        except FileExistsError:
            return
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(self._folder)
        kept = sorted(self._folder.glob(_PREFIX + "*"), key=lambda path: path.stat().st_mtime_ns)
        for path in kept[:-KEPT_MAX]:
            path.unlink(missing_ok=True)

    def remove(self, namespace_digest: bytes) -> None:
        self._path(namespace_digest).unlink(missing_ok=True)

    def _path(self, namespace_digest: bytes) -> Path:
        return self._folder / f"{_PREFIX}{namespace_digest.hex()}"


class _MemoryKeeper:
    """As long as the process lives, as blocks in DRAM do."""

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()

    def read(self, namespace_digest: bytes) -> bytes:
        return self._kept.get(namespace_digest, b"")

    def create(self, namespace_digest: bytes, values: bytes) -> None:
        self._kept.setdefault(namespace_digest, values)
        while len(self._kept) > KEPT_MAX:
            self._kept.popitem(last=False)

    def remove(self, namespace_digest: bytes) -> None:
        self._kept.pop(namespace_digest, None)


class _Sealed:
    """Another keeper's, each behind a checksum: bytes that a disk has changed would pass for KV
    of other weights."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def read(self, namespace_digest: bytes) -> bytes:
        kept = self._keeper.read(namespace_digest)
        values = kept[_CHECKSUM_BYTES:]
        if kept and kept[:_CHECKSUM_BYTES] != _checksum(namespace_digest, values):
            log.warning("a witness is damaged: removed namespace=%s", namespace_digest.hex())
            self._keeper.remove(namespace_digest)
            return b""
        return values

    def create(self, namespace_digest: bytes, values: bytes) -> None:
        self._keeper.create(namespace_digest, _checksum(namespace_digest, values) + values)

    def remove(self, namespace_digest: bytes) -> None:
        self._keeper.remove(namespace_digest)


def _checksum(namespace_digest: bytes, values: bytes) -> bytes:
    return xxhash.xxh3_64_digest(namespace_digest + values)


class _Question(NamedTuple):
    namespace_digest: bytes
    values: bytes
    """To be kept where there are none; empty: they are not."""
    answer: Callable[[list[bytes]], None]


class Witnesses:
    """Of all places of an agent. Answers come from a thread of its own."""

    def __init__(self, keepers: Iterable[Keeper]) -> None:
        self._keepers: list[Keeper] = [_MemoryKeeper(), *map(_Sealed, keepers)]
        self._questions: queue.Queue[_Question | None] = queue.Queue(QUEUE_MAX)
        threading.Thread(target=self._run, name="witnesses", daemon=True).start()

    def close(self) -> None:
        """A place that hangs is not waited for."""
        with contextlib.suppress(queue.Full):
            self._questions.put_nowait(None)

    def compare(
        self, namespace_digest: bytes, values: bytes, answer: Callable[[list[bytes]], None]
    ) -> None:
        """``answer`` is called with what is kept of the namespace, usually one: these values if
        there were none. With nothing if there are none, and ``values`` is empty."""
        try:
            self._questions.put_nowait(_Question(namespace_digest, values, answer))
        except queue.Full:
            log.warning("too many witnesses to look for at once: one is not compared")

    def _run(self) -> None:
        while (question := self._questions.get()) is not None:
            kept = [self._look(keeper, question, b"") for keeper in self._keepers]
            values = next(filter(None, kept), question.values)
            if values:  # also where another place had it: a new disk, a new URL
                for i, keeper in enumerate(self._keepers):
                    kept[i] = kept[i] or self._look(keeper, question, values)
            question.answer(list(dict.fromkeys(filter(None, kept))))

    def _look(self, keeper: Keeper, question: _Question, values: bytes) -> bytes:
        """What is kept in one place; with ``values``, after these were to be."""
        try:
            if values:
                keeper.create(question.namespace_digest, values)
            return keeper.read(question.namespace_digest)
        except Exception as error:  # of any store's library, or disk: nothing is known of it
            log.warning("the witness of a namespace could not be looked for: %s", error)
            return b""
