"""Blocks into packs, and packs into the store."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

from storage.block_format import Buffer, encode_header
from storage.remote.objects.calls import CalledOff, RemoteCalls
from storage.remote.packs.format import PackBuilder, PackClock, new_pack_path
from storage.remote.packs.pack import Pack
from storage.remote.settings import RemoteSettings
from storage.remote.upload_pacer import UploadPacer
from storage.tiers.io_threads import IoThreads
from storage.tiers.operation import Operation


class _OpenPack:
    """Blocks of one namespace that wait for others."""

    def __init__(self) -> None:
        self.since_s = time.monotonic()
        self.nbytes = 0
        self.operations: list[Operation] = []


class PackUploads:
    """``add`` and ``seal_due`` belong to the owner. ``written`` is called in a thread with a
    pack that is stored, before ``hand_back`` with each of its blocks."""

    def __init__(
        self,
        calls: RemoteCalls,
        pacer: UploadPacer,
        clock: PackClock,
        settings: RemoteSettings,
        written: Callable[[Pack], None],
        hand_back: Callable[[Operation], None],
    ) -> None:
        self._calls = calls
        self._pacer = pacer
        self._clock = clock
        self._settings = settings
        self._written = written
        self._hand_back = hand_back
        self._open: dict[bytes, _OpenPack] = {}
        self._threads = IoThreads("remote-write", max(1, settings.threads // 2))
        self.last_start_s = time.monotonic()
        """When a thread last began an upload."""

    def close(self, timeout_s: float) -> None:
        self._threads.close(timeout_s)

    def add(self, operation: Operation) -> None:
        """To the open pack of the block's namespace."""
        namespace_digest = operation.label.namespace_digest
        pack = self._open.setdefault(namespace_digest, _OpenPack())
        pack.operations.append(operation)
        pack.nbytes += operation.nbytes
        if pack.nbytes >= self._settings.pack_bytes:
            self._seal(namespace_digest)

    def seal_due(self, now: float) -> None:
        """Upload packs whose first block has waited long enough."""
        for namespace_digest, pack in list(self._open.items()):
            if now - pack.since_s >= self._settings.linger_s:
                self._seal(namespace_digest)

    def _seal(self, namespace_digest: bytes) -> None:
        operations = self._open.pop(namespace_digest).operations
        self._threads.submit(lambda: self._upload(namespace_digest, operations))

    def _upload(self, namespace_digest: bytes, operations: list[Operation]) -> None:
        """In a thread: one attempt after another, each with what is still wanted."""
        self.last_start_s = time.monotonic()
        path = new_pack_path(namespace_digest, self._clock.next_ms())
        content = _Content([], self._pacer, self._clock)

        def attempt() -> Iterator[Buffer]:
            nonlocal content
            content = _Content(operations, self._pacer, self._clock)
            return content.parts()

        error = None
        try:
            self._calls.write(path, attempt)
        except Exception as raised:  # whatever a store raises ends these blocks alone
            error = raised
        else:
            self._written(Pack(path, content.nbytes, content.builder.contents))
        now = time.monotonic()
        for operation in operations:
            operation.error = error
            operation.seconds = now - (operation.started_s or now)
            self._hand_back(operation)


class _Content:
    """The bytes of a pack, each block copied when its turn has come."""

    def __init__(self, operations: list[Operation], pacer: UploadPacer, clock: PackClock) -> None:
        self._operations = operations
        self._pacer = pacer
        self._clock = clock
        self.builder = PackBuilder()
        self.nbytes = 0

    def parts(self) -> Iterator[Buffer]:
        """Raises CalledOff if nobody waits for any of the blocks."""
        for part in itertools.chain(self._blocks(), self._footer()):
            self.nbytes += len(part)
            yield part

    def _blocks(self) -> Iterator[Buffer]:
        written_ms = self._clock.next_ms()
        for operation in self._operations:
            self._pacer.wait_turn(operation.nbytes)
            try:
                payload = operation.private_payload()
            except TimeoutError:
                continue
            operation.started_s = time.monotonic()  # progress: its time to fail begins anew
            self.builder.add(operation.key, len(payload), written_ms, operation.label)
            yield encode_header(operation.key, payload, operation.label)
            yield payload

    def _footer(self) -> Iterator[Buffer]:
        if not len(self.builder):
            raise CalledOff("all blocks were given up before they were sent")
        yield self.builder.footer()
