"""A tier that fails on purpose, around any other: for tests of what stands above it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from common.block import BlockKey
from common.messages.from_agents import Holding
from storage.index.owners import Selector
from storage.tiers.contract import (
    BlockCorrupt,
    BlockIO,
    Completion,
    Tier,
    TierFull,
    TierStats,
)


class FaultyTier:
    """Passes everything on to ``inner`` but for the faults that are set; the attributes may
    be changed at any time.

    A failed read scribbles over the caller's buffer, as a real one may, and completes with
    BlockCorrupt; the inner tier keeps the block. A failed write completes with TierFull.
    """

    def __init__(
        self, inner: Tier, seed: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.inner = inner
        self.name = inner.name
        self.unreadable: set[BlockKey] = set()
        self.unwritable: set[BlockKey] = set()
        self.read_failure_rate = 0.0
        self.write_failure_rate = 0.0
        self.delay_s_max = 0.0
        """Each block waits a random time up to this before it goes to the inner tier."""
        self.stalled = False
        """While True nothing reaches the inner tier."""
        self._random = random.Random(seed)
        self._clock = clock
        self._held: list[tuple[float, bool, BlockIO]] = []
        self._completions: list[Completion] = []

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        return self.inner.contains(keys)

    def touch(self, keys: Sequence[BlockKey], replaced: Sequence[BlockKey] = ()) -> None:
        self.inner.touch(keys, replaced)

    def submit_reads(self, blocks: Sequence[BlockIO]) -> None:
        self._submit(blocks, False, self.unreadable, self.read_failure_rate)

    def submit_writes(self, blocks: Sequence[BlockIO]) -> None:
        self._submit(blocks, True, self.unwritable, self.write_failure_rate)

    def poll(self) -> list[Completion]:
        self._pass_on()
        completions, self._completions = self._completions, []
        return completions + self.inner.poll()

    def take_changes(self) -> list[Holding]:
        return self.inner.take_changes()

    def drop(self, selector: Selector) -> None:
        self.inner.drop(selector)

    def take_drops(self) -> list[Selector]:
        return self.inner.take_drops()

    def keys(self) -> list[BlockKey]:
        return self.inner.keys()

    def stats(self) -> TierStats:
        return self.inner.stats()

    def close(self) -> None:
        self.inner.close()

    def _submit(
        self, blocks: Sequence[BlockIO], is_write: bool, failing: set[BlockKey], rate: float
    ) -> None:
        for block in blocks:
            if block.key in failing or self._random.random() < rate:
                self._fail(block, is_write)
            else:
                due = self._clock() + self._random.uniform(0, self.delay_s_max)
                self._held.append((due, is_write, block))
        self._pass_on()

    def _fail(self, block: BlockIO, is_write: bool) -> None:
        error: Exception = TierFull("injected") if is_write else BlockCorrupt("injected")
        if not is_write:
            block.buffer[:] = self._random.randbytes(block.buffer.nbytes)
        self._completions.append(Completion(block.key, is_write, error))

    def _pass_on(self) -> None:
        if self.stalled:
            return
        now = self._clock()
        held, self._held = self._held, []
        for due, is_write, block in held:
            if due > now:
                self._held.append((due, is_write, block))
            elif is_write:
                self.inner.submit_writes([block])
            else:
                self.inner.submit_reads([block])
