"""Blocks as objects of any file system that fsspec knows; docs/storage.md."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from typing import Any

from fsspec.core import url_to_fs
from fsspec.spec import AbstractFileSystem

from storage.block import UNLABELLED, BlockKey, BlockLabel
from storage.block_format import (
    HEADER_BYTES,
    encode_header,
    key_of_name,
    object_name,
    verify,
)
from storage.io_threads import IoThreads
from storage.queued_tier import CLOSE_TIMEOUT_S
from storage.threaded_tier import ThreadedTier
from storage.tier import BlockCorrupt, BlockMissing, TierName, Wake
from storage.tier_operation import Kind, Operation

logger = logging.getLogger(__name__)

_VISIBLE_AS_A_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "memory"}
"""Protocols whose uploads appear complete or not at all; others need a rename."""


class RemoteUnusable(Exception):
    """The remote URL cannot be used."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"cannot keep blocks at {url}: {reason}")
        self.url = url
        self.reason = reason


class RemoteTier(ThreadedTier):
    """One object a block under ``<url>/blocks``, shared with other agents.

    The index is a hint: a listing made in the background after the start, at most
    ``index_blocks_max`` blocks of it, and what this process wrote or read. Nothing is
    evicted: the store's own lifecycle rules do that. A call that has run for ``timeout_s``,
    or has waited so long while no other began, completes with TimeoutError, and its late
    result is dropped. Raises :class:`RemoteUnusable`.
    """

    index_is_complete = False

    def __init__(
        self,
        url: str,
        options: dict[str, Any],
        on_wake: Wake,
        threads: int = 8,
        timeout_s: float = 20.0,
        index_blocks_max: int = 1_000_000,
    ) -> None:
        self._timeout_s = timeout_s
        self._index_blocks_max = index_blocks_max
        self._filesystem, self._root = _open_filesystem(url, options)
        protocol = self._filesystem.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self._visible_as_a_whole = bool(protocols & _VISIBLE_AS_A_WHOLE)
        _probe(url, self._filesystem, self._root, timeout_s)
        super().__init__(TierName.REMOTE, on_wake)
        self._readers = IoThreads("remote-read", threads)
        self._writers = IoThreads("remote-write", max(1, threads // 2))
        self._last_start_s = dict.fromkeys(Kind, time.monotonic())
        """When an I/O thread last began an operation: set by any of them."""
        self._next_expiry_s = 0.0
        self._listed: deque[list[tuple[BlockKey, int]]] = deque()
        self._closed = threading.Event()
        self._helpers = [
            threading.Thread(target=target, name=f"remote-{target.__name__}", daemon=True)
            for target in (self._list_blocks, self._watch)
        ]
        for helper in self._helpers:
            helper.start()

    def close(self) -> None:
        self._closed.set()
        self._readers.close(CLOSE_TIMEOUT_S)
        self._writers.close(CLOSE_TIMEOUT_S)
        for helper in self._helpers:
            helper.join(CLOSE_TIMEOUT_S)

    def _executor(self, operation: Operation) -> IoThreads:
        return self._readers if operation.kind is Kind.READ else self._writers

    # ---- one block, in an I/O thread -------------------------------------------------

    def _path(self, key: BlockKey) -> str:
        return f"{self._root}/{object_name(key)}"

    def _load(self, operation: Operation) -> None:
        self._last_start_s[Kind.READ] = time.monotonic()
        try:
            stored = memoryview(self._filesystem.cat_file(self._path(operation.key)))
        except FileNotFoundError as error:
            raise BlockMissing("no such object") from error
        if stored.nbytes < HEADER_BYTES:
            raise BlockCorrupt(f"the object has {stored.nbytes} bytes")
        payload = stored[HEADER_BYTES:]
        operation.label = verify(stored[:HEADER_BYTES], payload, operation.key).label
        operation.deliver(payload)

    def _store(self, operation: Operation) -> None:
        self._last_start_s[Kind.WRITE] = time.monotonic()
        payload = operation.private_payload()
        stored = encode_header(operation.key, payload, operation.label) + payload
        path = self._path(operation.key)
        if self._visible_as_a_whole:
            self._filesystem.pipe_file(path, stored)
        else:
            temporary = f"{path}.{uuid.uuid4().hex}.tmp"
            self._filesystem.pipe_file(temporary, stored)
            self._filesystem.mv(temporary, path)

    def _remove(self, operation: Operation) -> None:
        try:
            self._filesystem.rm_file(self._path(operation.key))
        except FileNotFoundError:
            pass  # another agent was faster

    # ---- the owner's thread ----------------------------------------------------------

    def _drain(self) -> None:
        super()._drain()
        now = time.monotonic()
        if now >= self._next_expiry_s:
            self._next_expiry_s = now + self._timeout_s / 8
            self._expire(now)
        if self._listed:
            for key, stored_bytes in self._listed.popleft():
                if key not in self._index:
                    self._found(key, stored_bytes)
            self._on_wake()

    def _gain(self, key: BlockKey, place: int, label: BlockLabel = UNLABELLED) -> None:
        super()._gain(key, place, label)
        if len(self._index) > self._index_blocks_max:
            self._release(self._lose(next(iter(self._index))))

    def _expire(self, now: float) -> None:
        """Give up what has run, or waited without anything beginning, for too long."""
        overdue = [o for o in self._inflight if now - self._since(o) > self._timeout_s]
        for operation in overdue:
            if operation.give_up():
                operation.error = TimeoutError(f"no answer within {self._timeout_s} s")
                self._end(operation)

    def _since(self, operation: Operation) -> float:
        if operation.started_s is not None:
            return operation.started_s
        return max(operation.submitted_s, self._last_start_s[operation.kind])

    # ---- helper threads --------------------------------------------------------------

    def _watch(self) -> None:
        """Have the owner poll while calls are out, so that it sees deadlines pass."""
        while not self._closed.wait(self._timeout_s / 4):
            if self._inflight:
                self._on_wake()

    def _list_blocks(self) -> None:
        """Find what is there already, a fan-out folder at a time."""
        listed = 0
        try:
            for folder in self._list(f"{self._root}/blocks"):
                if self._closed.is_set() or listed >= self._index_blocks_max:
                    return
                entries = self._list(folder["name"])
                named = ((key_of_name(e["name"].rsplit("/", 1)[-1]), e["size"]) for e in entries)
                blocks = [(key, size) for key, size in named if key is not None]
                listed += len(blocks)
                self._listed.append(blocks)
                self._on_wake()
        except Exception as error:  # only hints are lost: blocks are tried all the same
            logger.warning("listing of the remote tier ended early: %s", error)

    def _list(self, path: str) -> list[dict[str, Any]]:
        try:
            return list(self._filesystem.ls(path, detail=True))
        except FileNotFoundError:
            return []


def _open_filesystem(url: str, options: dict[str, Any]) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL and the root path in it."""
    protocol, separator, _ = url.partition("://")
    if not separator:
        raise RemoteUnusable(url, "it is no URL; for a folder, write file:///path/to/folder")
    if protocol in ("file", "local"):
        options = {"auto_mkdir": True, **options}
    try:
        filesystem, root = url_to_fs(
            url, **{"use_listings_cache": False, "skip_instance_cache": True, **options}
        )
    except (ValueError, TypeError, ImportError) as error:
        raise RemoteUnusable(url, str(error)) from error
    return filesystem, root.rstrip("/")


def _probe(url: str, filesystem: AbstractFileSystem, root: str, timeout_s: float) -> None:
    """Write, list and delete a small object; RemoteUnusable if that fails or takes too long."""
    errors: list[Exception | None] = []

    def write_list_delete() -> None:
        path = f"{root}/probe-{uuid.uuid4().hex}"
        try:
            filesystem.pipe_file(path, b"dualpath")
            filesystem.ls(root)
            filesystem.rm_file(path)
        except Exception as error:  # whatever it is, it is the reason that the operator reads
            errors.append(error)
        else:
            errors.append(None)

    thread = threading.Thread(target=write_list_delete, name="remote-probe", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not errors:
        raise RemoteUnusable(url, f"no answer within {timeout_s:g} s")
    if errors[0] is not None:
        raise RemoteUnusable(url, f"{type(errors[0]).__name__}: {errors[0]}")
