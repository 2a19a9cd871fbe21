"""Blocks out of packs: neighbours together, each verified on its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from storage.block_format import HEADER_BYTES, verify
from storage.remote.objects.calls import RemoteCalls
from storage.remote.packs.pack import Pack
from storage.remote.upload_pacer import UploadPacer
from storage.tiers.contract import BlockMissing
from storage.tiers.io_threads import IoThreads
from storage.tiers.operation import Operation

RUN_BYTES_MIN = 512 << 10
"""Below that a request costs more than its bytes: neighbours share one, ..."""
RUN_BYTES_MAX = 2 << 20
"""... and above it, requests side by side are faster than one."""
GAP_BYTES_MAX = 64 << 10
"""Bytes that are read in vain rather than ask twice."""


class PackGone(BlockMissing):
    """Others have deleted the pack; the block may lie in another one by now."""


class Run:
    """Neighbouring blocks of a pack, read with one request."""

    def __init__(self, pack: Pack, start: int, nbytes: int, operation: Operation) -> None:
        self.pack = pack
        self.start = start
        self.nbytes = nbytes
        self.blocks = [(start, nbytes, operation)]

    def takes(self, pack: Pack, start: int, nbytes: int, limit_bytes: int) -> bool:
        """Is the next block, by offset, near enough?"""
        gap_bytes = start - (self.start + self.nbytes)
        is_near = self.pack is pack and gap_bytes <= GAP_BYTES_MAX
        return is_near and start + nbytes - self.start <= limit_bytes

    def append(self, start: int, nbytes: int, operation: Operation) -> None:
        self.blocks.append((start, nbytes, operation))
        self.nbytes = max(self.nbytes, start + nbytes - self.start)


def cut_runs(located: Iterable[tuple[Pack, int, Operation]], threads: int) -> list[Run]:
    """Blocks as (pack, row, operation) into requests, about one a thread."""
    spans = [(pack, *pack.span(row), operation) for pack, row, operation in located]
    spans.sort(key=lambda span: (span[0].number, span[1]))
    total_bytes = sum(nbytes for _, _, nbytes, _ in spans)
    limit_bytes = min(max(total_bytes // threads, RUN_BYTES_MIN), RUN_BYTES_MAX)
    runs: list[Run] = []
    for pack, start, nbytes, operation in spans:
        if runs and runs[-1].takes(pack, start, nbytes, limit_bytes):
            runs[-1].append(start, nbytes, operation)
        else:
            runs.append(Run(pack, start, nbytes, operation))
    return runs


class PackReads:
    """Reads runs in its threads; ``hand_back`` is called there with each block."""

    def __init__(
        self,
        calls: RemoteCalls,
        pacer: UploadPacer,
        threads: int,
        hand_back: Callable[[Operation], None],
    ) -> None:
        self._calls = calls
        self._pacer = pacer
        self._num_threads = threads
        self._threads = IoThreads("remote-read", threads)
        self._hand_back = hand_back
        self.last_start_s = time.monotonic()
        """When a thread last began a run."""

    def close(self, timeout_s: float) -> None:
        self._threads.close(timeout_s)

    def submit(self, located: Sequence[tuple[Pack, int, Operation]]) -> None:
        for run in cut_runs(located, self._num_threads):
            self._pacer.read_begins(run.nbytes)
            self._threads.submit(partial(self._read, run))

    def _read(self, run: Run) -> None:
        started_s = self.last_start_s = time.monotonic()
        for _, _, operation in run.blocks:
            operation.started_s = started_s
        stored, error = memoryview(b""), None  # type: memoryview, Exception | None
        try:
            if not all(operation.is_given_up for _, _, operation in run.blocks):
                stored = memoryview(self._calls.read(run.pack.path, run.start, run.nbytes))
        except FileNotFoundError:
            error = PackGone(f"{run.pack.path} is gone")
        except Exception as raised:  # whatever a store raises ends this run alone
            error = raised
        finally:
            self._pacer.read_ends(run.nbytes)
        for start, nbytes, operation in run.blocks:
            at = start - run.start
            operation.error = error or _deliver(stored[at : at + nbytes], operation)
            operation.seconds = time.monotonic() - started_s
            self._hand_back(operation)


def _deliver(stored: memoryview, operation: Operation) -> Exception | None:
    """Into the caller's buffer if it is the block, whole."""
    try:
        payload = stored[HEADER_BYTES:]
        operation.label = verify(stored[:HEADER_BYTES], payload, operation.key).label
        operation.deliver(payload)
    except Exception as error:  # whatever is wrong with the bytes ends this block alone
        return error
    return None
