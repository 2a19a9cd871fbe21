"""What moves the blocks of a remote tier: into packs, out of packs, and when it is given up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from storage.index.owners import Selector
from storage.remote.objects.calls import RemoteCalls
from storage.remote.objects.object_store import ObjectStore
from storage.remote.packs.catalog import (
    Drop,
    PackCatalog,
    knows_all,
    misdated,
    new_drop_path,
)
from storage.remote.packs.format import PackClock, now_ms
from storage.remote.packs.indexer import PackIndexer
from storage.remote.packs.known import KnownPacks
from storage.remote.packs.pack import Pack
from storage.remote.packs.reads import PackGone, PackReads
from storage.remote.packs.upkeep import (
    PackUpkeep,
    latest_manifest_ms,
    old_drops,
    plan_upkeep,
    unused_witnesses,
)
from storage.remote.packs.uploads import PackUploads
from storage.remote.settings import RemoteSettings
from storage.remote.upload_pacer import UploadPacer
from storage.tiers.contract import BlockMissing, PackStats, TierStats
from storage.tiers.io_threads import CLOSE_TIMEOUT_S
from storage.tiers.operation import Kind, Operation
from storage.tiers.operation_queue import OperationQueue
from storage.tiers.room import Room

logger = logging.getLogger(__name__)


class RemoteBackend:
    """A :class:`storage.tiers.placement.Backend`. A read of a block that is in no known pack
    waits for a look at the store that begins after it was asked for."""

    # packs are not changed; the block is written anew, into another one
    removed_on: tuple[type[Exception], ...] = ()

    def __init__(
        self,
        store: ObjectStore,
        settings: RemoteSettings,
        queue: OperationQueue,
        room: Room,
        packs: KnownPacks,
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._room = room
        self._packs = packs
        self._unlocated: list[tuple[int, Operation]] = []
        """Reads, each with the look that it waits for."""
        self._next_check_s = 0.0
        self._next_upkeep_s = time.monotonic() + settings.upkeep_s
        self._clock = clock = PackClock()
        pacer = UploadPacer()
        self.indexer = PackIndexer(packs, room, clock, settings.index_blocks_max, queue.wake)
        self.calls = RemoteCalls(
            store, settings.timeout_s, settings.hedge_after_s, settings.threads
        )
        self._reads = PackReads(self.calls, pacer, settings.threads, queue.hand_back)
        self._uploads = PackUploads(
            self.calls, pacer, clock, settings, self._written, queue.hand_back
        )
        self._catalog = PackCatalog(self.calls, self.indexer.report, settings.refresh_s)
        self._upkeep = PackUpkeep(self.calls, pacer, clock, settings, self.indexer.report)
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="remote-watch", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        self._closed.set()
        end = time.monotonic() + CLOSE_TIMEOUT_S
        for part in (self._upkeep, self._catalog, self._reads, self._uploads, self.calls):
            part.close(max(0.1, end - time.monotonic()))
        self._watcher.join(max(0.1, end - time.monotonic()))

    def stats(self) -> TierStats:
        io = self._queue.stats.snapshot()
        io.retries_total = self.calls.retries_total
        packs = PackStats(
            packs=len(self._packs),
            unreadable_packs_total=self._catalog.unreadable_packs_total,
            hedged_reads_total=self.calls.hedged_reads_total,
        )
        return TierStats(self._room.stats(), io, packs=packs)

    # ---- one block ----------------------------------------------------------------------

    def start(self, operations: Sequence[Operation]) -> None:
        located = []
        for operation in operations:
            if operation.kind is Kind.WRITE:
                self._uploads.add(operation)
            elif operation.place is None:
                self._unlocated.append((self._catalog.look(), operation))
            else:
                located.append((*self._packs.at(operation.place), operation))
        if located:
            self._reads.submit(located)

    def accept(self, operation: Operation) -> bool:
        self.indexer.adopt_own()  # before their blocks are known to be stored
        if not isinstance(operation.error, PackGone) or operation.place is None:
            return True
        number, place = self._catalog.look(), operation.place
        operation.error = operation.place = None
        self._unlocated.append((number, operation))
        if self._room.held.get(operation.key) == place:
            self.indexer.forget(self._packs.at(place)[0])
        return False

    def _written(self, pack: Pack) -> None:
        self._catalog.note(pack.path)
        self.indexer.written(pack)

    # ---- at each poll, and now and then -------------------------------------------------

    def tend(self) -> list[Operation]:
        if self.indexer.adopt_news():
            self._queue.wake()
        ended = self._locate()
        now = time.monotonic()
        self._uploads.seal_due(now)
        if now >= self._next_check_s:
            self._next_check_s = now + self._settings.timeout_s / 8
            ended += self._overdue(now)
        if now >= self._next_upkeep_s and self.indexer.knows_all:
            self._next_upkeep_s = now + self._settings.upkeep_s
            self._plan_upkeep()
        return ended

    def _locate(self) -> list[Operation]:
        """Read what has waited for a look; returns what is in no pack."""
        waiting, self._unlocated = self._unlocated, []
        located, missing = [], []
        for number, operation in waiting:
            if operation not in self._queue.in_flight:
                continue
            operation.place = self._room.held.get(operation.key)
            if operation.place is not None:
                located.append(operation)
            elif number <= self.indexer.looks:
                operation.error = BlockMissing("in no pack")
                missing.append(operation)
            else:
                self._unlocated.append((number, operation))
        self.start(located)
        return missing

    def _overdue(self, now: float) -> list[Operation]:
        """What has run, or waited without anything beginning, for too long: it is given up."""
        timeout_s = self._settings.timeout_s
        overdue = [o for o in self._queue.in_flight if now - self._since(o) > timeout_s]
        given_up = [operation for operation in overdue if operation.give_up()]
        for operation in given_up:
            operation.error = TimeoutError(f"no progress within {timeout_s:g} s")
        return given_up

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
        objects, packs, now = self.indexer.objects, list(self._packs), now_ms()
        plan = plan_upkeep(
            packs,
            self.indexer.live_rows,
            self._settings,
            now=now,
            manifest_ms=latest_manifest_ms(objects),
        )
        plan = plan._replace(misdated=misdated(self.indexer.drops))
        if knows_all(objects, packs):
            drops, unused = old_drops(self.indexer.drops, now), unused_witnesses(objects, packs)
            plan = plan._replace(drops=drops, witnesses=unused)
        if plan:
            self._upkeep.submit(plan, objects, packs)

    def _watch(self) -> None:
        """Have the owner poll now and then: for deadlines, for packs to be closed, for upkeep."""
        settings = self._settings
        pause_s = min(settings.timeout_s / 4, settings.linger_s / 2, settings.upkeep_s / 2)
        while not self._closed.wait(max(0.01, pause_s)):
            if self._queue.in_flight or time.monotonic() >= self._next_upkeep_s:
                self._queue.wake()

    # ---- drops --------------------------------------------------------------------------

    def drop(self, selector: Selector) -> None:
        """For every process that shares the store, within ``refresh_s``."""
        drop = Drop(selector, self._clock.next_ms())
        path = new_drop_path(drop)
        self.indexer.drop(path, drop)
        self._upkeep.write_drop(path, drop)

    def take_drops(self) -> list[Selector]:
        return self.indexer.take_drops()
