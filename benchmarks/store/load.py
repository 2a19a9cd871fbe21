"""Loads for the storage benchmark: the SSD tier, raw files and SGLang's file backend."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from common.block import BlockKey
from storage.ssd.tier import SsdTier
from storage.tiers.contract import BlockIO, Completion, Tier

DEPTH = 64
"""Blocks that are in flight at once."""
BATCH = 16
"""Submitted at once, as an agent does with a plan's share."""
RUN_S = 0.5
WAIT_S_MAX = 30.0


class LoadFailed(Exception):
    """A block was not read or written."""


class Memory:
    """Page-aligned memory with random bytes, cut into as many buffers as blocks in flight."""

    def __init__(self, nbytes: int) -> None:
        self._view = memoryview(mmap.mmap(-1, nbytes))
        content = np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)
        np.frombuffer(self._view, np.uint8)[:] = content

    def buffers(self, block_bytes: int) -> list[memoryview]:
        starts = range(0, DEPTH * block_bytes, block_bytes)
        return [self._view[start : start + block_bytes] for start in starts]


_AnyTier = TypeVar("_AnyTier", bound=Tier)


class TierLoad(Generic[_AnyTier]):
    """Keeps ``DEPTH`` blocks of one size in flight at a tier, which sets ``wake``."""

    def __init__(
        self, tier: _AnyTier, wake: threading.Event, block_bytes: int, memory: Memory
    ) -> None:
        self.tier = tier
        self.block_bytes = block_bytes
        self._wake = wake
        self._buffers = memory.buffers(block_bytes)
        self._chance = random.Random(2)

    def _new_block(self) -> BlockKey:
        return BlockKey(self._chance.randbytes(32))

    def _run(
        self,
        next_key: Callable[[], BlockKey],
        submit: Callable[[list[BlockIO]], None],
        blocks: int = 0,
    ) -> float:
        """``blocks`` of them, rounded up to batches, or for ``RUN_S``; all of it is finished."""
        free, used = list(range(DEPTH)), dict[BlockKey, int]()
        begun = done = 0
        start = time.perf_counter()
        while True:
            self._wake.clear()
            more = begun < blocks if blocks else time.perf_counter() < start + RUN_S
            batch: list[BlockIO] = []
            while more and (batch or len(free) >= BATCH) and len(batch) < BATCH:
                key = next_key()
                if key not in used:
                    used[key] = free.pop()
                    batch.append(BlockIO(key, self._buffers[used[key]]))
                    begun += 1
            submit(batch)
            completions = self.tier.poll()
            self.tier.take_changes()
            for completion in completions:
                free.append(used.pop(checked(completion).key))
                done += 1
            if not more and not used:
                return done * self.block_bytes / (time.perf_counter() - start)
            if not completions and not self._wake.wait(WAIT_S_MAX):
                raise LoadFailed(f"nothing completed within {WAIT_S_MAX:g} s")


class SsdLoad(TierLoad[SsdTier]):
    """Of an SSD tier, which it fills with ``blocks``."""

    def __init__(self, folder: Path, block_bytes: int, blocks: int, memory: Memory) -> None:
        wake = threading.Event()
        tier = SsdTier(folder, blocks * (block_bytes + 4096), wake.set)
        super().__init__(tier, wake, block_bytes, memory)
        self._run(self._new_block, tier.submit_writes, blocks)

    def write(self) -> float:
        """Bytes per second of new blocks, each durable; old ones are evicted for them."""
        return self._run(self._new_block, self.tier.submit_writes)

    def read(self) -> float:
        """Bytes per second of random blocks, each verified."""
        keys = self.tier.keys()
        return self._run(lambda: self._chance.choice(keys), self.tier.submit_reads)


def checked(completion: Completion) -> Completion:
    if completion.error is not None:
        raise LoadFailed(f"a block failed: {completion.error}") from completion.error
    return completion


class RawFile:
    """A preallocated file, read and written with O_DIRECT by plain threads."""

    def __init__(self, path: Path, nbytes: int, memory: Memory) -> None:
        self._memory = memory
        self._nbytes = nbytes
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644)
        os.posix_fallocate(self._fd, 0, nbytes)
        piece = 4 << 20
        for offset in range(0, nbytes, piece):
            os.pwritev(self._fd, [memory.buffers(piece)[0]], offset)
        os.fdatasync(self._fd)

    def read(self, block_bytes: int, threads: int) -> float:
        """Bytes per second."""
        return self._run(os.preadv, block_bytes, threads)

    def write(self, block_bytes: int, threads: int) -> float:
        """Bytes per second that are synced, by a thread that syncs without a pause."""
        ended = threading.Event()

        def sync() -> None:
            while not ended.is_set():
                os.fdatasync(self._fd)

        syncer = threading.Thread(target=sync)
        syncer.start()
        try:
            return self._run(os.pwritev, block_bytes, threads, lambda: os.fdatasync(self._fd))
        finally:
            ended.set()
            syncer.join()

    def close(self) -> None:
        os.close(self._fd)

    def _run(
        self,
        call: Callable[..., int],
        block_bytes: int,
        threads: int,
        finish: Callable[[], None] = lambda: None,
    ) -> float:
        buffers = [[buffer] for buffer in self._memory.buffers(block_bytes)]
        blocks, counts = self._nbytes // block_bytes, [0] * threads
        start = time.perf_counter()

        def work(thread: int) -> None:
            chance, own = random.Random(thread), buffers[thread::threads]
            while time.perf_counter() < start + RUN_S:
                part = own[counts[thread] % len(own)]
                call(self._fd, part, chance.randrange(blocks) * block_bytes)
                counts[thread] += 1

        workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        finish()
        return sum(counts) * block_bytes / (time.perf_counter() - start)


class HiCacheLoad:
    """SGLang's own file backend over the same number of blocks; read as its controller does,
    a batch of pages at a time, from a dropped page cache."""

    def __init__(self, folder: Path, block_bytes: int, blocks: int) -> None:
        import torch
        from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

        config = HiCacheStorageConfig(
            *(0, 1, 0, 1, 0, 1),
            is_mla_model=False,
            enable_storage_metrics=False,
            is_page_first_layout=False,
            model_name="benchmark",
        )
        self._folder, self._block_bytes = folder, block_bytes
        self._backend = HiCacheFile(config, str(folder))
        self._keys = [f"{i:064x}" for i in range(blocks)]
        self._targets = [torch.zeros(block_bytes, dtype=torch.uint8) for _ in range(DEPTH)]
        page = torch.randint(0, 256, (block_bytes,), dtype=torch.uint8)
        for key in self._keys:
            self._backend.set(key, page)
        os.sync()

    def read(self) -> float:
        """Bytes per second, each block at most once."""
        for path in self._folder.iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        keys = random.sample(self._keys, len(self._keys))
        start, done = time.perf_counter(), 0
        for first in range(0, len(keys) - DEPTH + 1, DEPTH):
            pages = self._backend.batch_get(keys[first : first + DEPTH], self._targets)
            if any(page is None for page in pages):
                raise LoadFailed("the file backend lost a page")
            done += DEPTH
            if time.perf_counter() > start + RUN_S:
                break
        return done * self._block_bytes / (time.perf_counter() - start)


@contextlib.contextmanager
def busy_thread() -> Iterator[None]:
    """A Python thread that never waits, beside whatever runs inside."""
    ended = threading.Event()

    def spin() -> None:
        while not ended.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
