"""Blocks in packs below any URL that fsspec knows; docs/storage.md."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from common.block import UNLABELLED, BlockKey, BlockLabel, TierName
from storage.index.owners import Selector
from storage.remote.objects.calls import RemoteCalls
from storage.remote.objects.object_store import RemoteUnusable, StoredObject
from storage.remote.objects.open_store import open_store
from storage.remote.packs.book import PackBook
from storage.remote.packs.catalog import (
    Drop,
    DropFound,
    News,
    PackCatalog,
    PackFound,
    PacksGone,
    dropped_before_ms,
)
from storage.remote.packs.format import PackClock, now_ms
from storage.remote.packs.pack import Pack
from storage.remote.packs.reads import PackGone, PackReads
from storage.remote.packs.upkeep import LiveRows, PackUpkeep, latest_manifest_ms, plan_upkeep
from storage.remote.packs.uploads import PackUploads
from storage.remote.settings import RemoteSettings
from storage.remote.upload_pacer import UploadPacer
from storage.tiers.contract import BlockIO, BlockMissing, TierStats, Wake
from storage.tiers.operation import Kind, Operation
from storage.tiers.queued_tier import CLOSE_TIMEOUT_S, QueuedTier

__all__ = ["RemoteSettings", "RemoteTier", "RemoteUnusable"]

logger = logging.getLogger(__name__)

ADOPT_ROWS = 512
"""Blocks that are indexed at once."""
ADOPT_S = 0.005
"""Spent on that at a poll, so that the owner is not kept."""
_DONE = object()
_NO_PLACE = -1
"""Of a block on its way into a pack."""


class RemoteTier(QueuedTier):
    """Packs below ``url``, shared with other agents and clusters.

    The index has what this process wrote, and what its looks at the store have found. A read
    of a block that is not in it waits for a look that begins after the read was asked for. A block
    that has made no progress for ``timeout_s`` completes with TimeoutError, and what comes late
    is dropped. Blocks go by age and capacity, pack by pack, not because they are written
    (:mod:`storage.remote.packs.upkeep`). Raises :class:`RemoteUnusable`.
    """

    index_is_complete = False
    removed_on = ()  # packs are not changed; the block is written anew, into another one

    def __init__(
        self,
        url: str,
        options: dict[str, Any],
        on_wake: Wake,
        settings: RemoteSettings | None = None,
    ) -> None:
        self._settings = settings = settings or RemoteSettings()
        store = open_store(url, options, settings.timeout_s)
        super().__init__(TierName.REMOTE, on_wake)
        self._stats.capacity_bytes = settings.capacity_bytes
        self._packs = PackBook()
        self._drops: list[Drop] = []
        self._new_drops: list[Selector] = []
        """Of other processes, not taken yet."""
        self._own_packs: deque[Pack] = deque()
        """Just written here, not in the index yet."""
        self._news: deque[News] = deque()
        self._adopting: Iterator[None] | None = None
        self._looks = 0
        """Number of the last look that is in the index."""
        self._objects: list[StoredObject] = []
        self._unlocated: list[tuple[int, Operation]] = []
        """Reads, each with the look that it waits for."""
        self._located: list[tuple[Pack, int, Operation]] = []
        self._numbers = itertools.count()
        self._next_check_s = 0.0
        self._next_upkeep_s = time.monotonic() + settings.upkeep_s
        self._clock = PackClock()
        self._pacer = UploadPacer()
        self._calls = RemoteCalls(
            *(store, settings.timeout_s, settings.hedge_after_s, settings.threads)
        )
        self._reads = PackReads(self._calls, self._pacer, settings.threads, self._hand_back)
        self._uploads = PackUploads(
            *(self._calls, self._pacer, self._clock, settings),
            *(self._written, self._hand_back),
        )
        self._catalog = PackCatalog(self._calls, self._report, settings.refresh_s)
        self._upkeep = PackUpkeep(self._calls, self._pacer, self._clock, settings, self._report)
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="remote-watch", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        self._closed.set()
        end = time.monotonic() + CLOSE_TIMEOUT_S
        for part in (self._upkeep, self._catalog, self._reads, self._uploads, self._calls):
            part.close(max(0.1, end - time.monotonic()))
        self._watcher.join(max(0.1, end - time.monotonic()))

    def stats(self) -> TierStats:
        self._stats.used_bytes = self._packs.used_bytes
        self._stats.packs = len(self._packs)
        self._stats.unreadable_packs_total = self._catalog.unreadable_packs_total
        self._stats.retries_total = self._calls.retries_total
        self._stats.hedged_reads_total = self._calls.hedged_reads_total
        return super().stats()

    @property
    def has_looked(self) -> bool:
        """What lay in the store at start is in the index."""
        return self._looks > 0

    @property
    def _knows_all(self) -> bool:
        """All that was found is in the index, or has gone from it again."""
        return self.has_looked and self._adopting is None and not self._news

    def known_packs(self) -> list[Pack]:
        """The oldest first."""
        return list(self._packs)

    # ---- reads and writes -------------------------------------------------------------

    def submit_reads(self, blocks: Sequence[BlockIO]) -> None:
        super().submit_reads(blocks)
        self._submit_located()

    def _launch(self, operation: Operation) -> None:
        if operation.kind is Kind.WRITE:
            self._uploads.add(operation)
        elif operation.place is None:
            self._unlocated.append((self._catalog.look(), operation))
        else:
            self._located.append((*self._packs.at(operation.place), operation))

    def _submit_located(self) -> None:
        located, self._located = self._located, []
        self._reads.submit(located)

    def _locate(self) -> None:
        """Read, or fail, what has waited for a look."""
        waiting, self._unlocated = self._unlocated, []
        for number, operation in waiting:
            if operation not in self._inflight:
                continue
            operation.place = self._index.get(operation.key)
            if operation.place is not None:
                self._located.append((*self._packs.at(operation.place), operation))
            elif number <= self._looks:
                operation.error = BlockMissing("in no pack")
                self._end(operation)
            else:
                self._unlocated.append((number, operation))
        self._submit_located()

    def _end(self, operation: Operation) -> None:
        while self._own_packs:  # before their blocks are known to be stored
            for _ in self._adopt_pack(self._own_packs.popleft()):
                pass
        if isinstance(operation.error, PackGone) and operation.place is not None:
            number, place = self._catalog.look(), operation.place
            operation.error = operation.place = None
            self._unlocated.append((number, operation))
            if self._index.get(operation.key) == place:
                self._forget(self._packs.at(place)[0])
        else:
            super()._end(operation)

    # ---- the owner's loop ---------------------------------------------------------------

    def _drain(self) -> None:
        self._adopt_news()
        super()._drain()
        self._locate()
        now = time.monotonic()
        self._uploads.seal_due(now)
        if now >= self._next_check_s:
            self._next_check_s = now + self._settings.timeout_s / 8
            self._expire(now)
        if now >= self._next_upkeep_s and self._knows_all:
            self._next_upkeep_s = now + self._settings.upkeep_s
            self._plan_upkeep()

    def _expire(self, now: float) -> None:
        """Give up what has run, or waited without anything beginning, for too long."""
        timeout_s = self._settings.timeout_s
        overdue = [o for o in self._inflight if now - self._since(o) > timeout_s]
        for operation in overdue:
            if operation.give_up():
                operation.error = TimeoutError(f"no progress within {timeout_s:g} s")
                self._end(operation)

    def _since(self, operation: Operation) -> float:
        if operation.started_s is not None:
            return operation.started_s
        if operation.kind is Kind.READ and operation.place is None:
            return operation.submitted_s
        runner = self._reads if operation.kind is Kind.READ else self._uploads
        return max(operation.submitted_s, runner.last_start_s)

    def _plan_upkeep(self) -> None:
        """Only with an index that has all that was found: what is not in it counts as dead."""
        if self._upkeep.is_busy:
            return
        plan = plan_upkeep(
            *(self.known_packs(), self._live_rows, self._settings),
            *(now_ms(), latest_manifest_ms(self._objects)),
        )
        if plan:
            self._upkeep.submit(plan, self._objects)

    def _live_rows(self, pack: Pack) -> LiveRows:
        keys = enumerate(pack.keys())
        live = [row for row, key in keys if self._index.get(key) == pack.place(row)]
        return np.array(live, np.int64)

    # ---- what comes from the threads ----------------------------------------------------

    def _report(self, news: News) -> None:
        self._news.append(news)
        self._wake()

    def _written(self, pack: Pack) -> None:
        self._catalog.note(pack.path)
        self._own_packs.append(pack)

    def _watch(self) -> None:
        """Have the owner poll now and then: for deadlines, for packs to be closed, for upkeep."""
        settings = self._settings
        pause_s = min(settings.timeout_s / 4, settings.linger_s / 2, settings.upkeep_s / 2)
        while not self._closed.wait(max(0.01, pause_s)):
            if self._inflight or time.monotonic() >= self._next_upkeep_s:
                self._on_wake()

    def _adopt_news(self) -> None:
        """For about ``ADOPT_S``; the rest at the next poll."""
        end = time.monotonic() + ADOPT_S
        while self._adopting is not None or self._news:
            if time.monotonic() > end:
                self._on_wake()
                return
            if self._adopting is None:
                self._adopting = self._adopt(self._news.popleft())
            if next(self._adopting, _DONE) is _DONE:
                self._adopting = None

    def _adopt(self, news: News) -> Iterator[None]:
        """Yields after each part."""
        if isinstance(news, PackFound):
            yield from self._adopt_pack(news.pack)
        elif isinstance(news, PacksGone):
            for path in news.paths:
                if (pack := self._packs.get(path)) is not None:
                    self._forget(pack)
                    yield
        elif isinstance(news, DropFound):
            yield from self._adopt_drop(news.drop)
        else:
            self._looks, self._objects = news.number, news.objects

    def _adopt_drop(self, drop: Drop) -> Iterator[None]:
        self._drops.append(drop)
        self._new_drops.append(drop.selector)
        self._index.drop(drop.selector)
        for pack in self.known_packs():  # what was written after it stays
            is_dropped = any(drop.selector.value_of(label.owner) for label in pack.labels)
            if is_dropped and int(pack.rows["written_ms"].max()) > drop.before_ms:
                yield from self._index_pack(pack)

    def _adopt_pack(self, pack: Pack) -> Iterator[None]:
        if pack.path in self._packs:
            return
        pack.number = next(self._numbers)
        self._clock.see(pack.path)
        self._packs.add(pack)
        yield from self._index_pack(pack)
        while len(self._index) > self._settings.index_blocks_max and len(self._packs) > 1:
            logger.warning("the remote tier holds more blocks than the index may: oldest unused")
            self._forget(next(iter(self._packs)))

    def _index_pack(self, pack: Pack) -> Iterator[None]:
        """Its blocks but for dropped ones, and those of which a later pack has a copy."""
        dead_before_ms = [dropped_before_ms(self._drops, label) for label in pack.labels]
        rows, keys = pack.rows, pack.keys()
        for number, label in enumerate(pack.labels):
            is_wanted = rows["label"] == number
            is_wanted &= rows["written_ms"].astype(np.int64) > dead_before_ms[number]
            wanted = np.flatnonzero(is_wanted)
            for first in range(0, len(wanted), ADOPT_ROWS):
                if pack.path not in self._packs:
                    return  # it has gone meanwhile
                part = {keys[row]: row for row in wanted[first : first + ADOPT_ROWS].tolist()}
                self._gain_many(pack, part, label)
                yield

    # ---- what is held -------------------------------------------------------------------

    def _forget(self, pack: Pack) -> None:
        """The pack is gone, or not used any more."""
        for key in self._index.between(pack.place(0), pack.place(len(pack.rows))):
            self._release(self._lose(key))
        self._packs.remove(pack)

    def _gain(self, key: BlockKey, place: int, label: BlockLabel = UNLABELLED) -> None:
        """Of a block in two packs the later one counts, for every process alike."""
        held = self._index.get(key)
        if held is not None and self._packs.at(held)[0].order >= self._packs.at(place)[0].order:
            return
        if held is not None or self._index.is_dropped(key):
            self._release(self._lose(key))
        super()._gain(key, place, label)
        self._packs.count_live(place, 1)

    def _gain_many(self, pack: Pack, located: dict[BlockKey, int], label: BlockLabel) -> None:
        """Blocks of a pack by their rows; most are new."""
        for key in [key for key in located if self._index.lies_here(key)]:
            self._gain(key, pack.place(located.pop(key)), label)
        rows = np.fromiter(located.values(), np.int64, len(located))
        nbytes = pack.stored_bytes(rows)
        self._index.add_many(list(located), pack.place(0) + rows, nbytes, label)
        pack.live_blocks += len(located)
        pack.live_bytes += nbytes

    def _bytes_at(self, place: int) -> int:
        return self._packs.bytes_at(place)

    def _end_write(self, operation: Operation) -> None:
        """Whether the block is here now, its pack and any drops have told already."""
        self._index.owners.note(operation.group, 0, -self._stored_bytes(operation.nbytes))
        if operation.error is None:
            self._stats.write_bytes_total += operation.nbytes

    def _reserve(self, nbytes: int) -> int:
        return _NO_PLACE

    def _release(self, place: int | None) -> None:
        if place is not None:
            self._packs.count_live(place, -1)

    def _found(self, key: BlockKey, stored_bytes: int, label: BlockLabel = UNLABELLED) -> None:
        """Its pack was given up while it was read: it stays forgotten."""

    def _erase(self, key: BlockKey) -> None:
        """Its bytes stay until its pack is rewritten."""

    # ---- drops --------------------------------------------------------------------------

    def drop(self, selector: Selector) -> None:
        """For every process that shares the store, within ``refresh_s``."""
        drop = Drop(selector, now_ms())
        self._drops.append(drop)
        self._upkeep.write_drop(drop)
        super().drop(selector)

    def take_drops(self) -> list[Selector]:
        drops, self._new_drops = self._new_drops, []
        return drops
