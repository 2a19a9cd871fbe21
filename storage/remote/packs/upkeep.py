"""Upkeep of the remote store: what is old, dead or scattered goes, and the manifest follows.

The owner of the index decides, by :func:`plan_upkeep`, without I/O; a thread carries it out.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.block import BlockOwner
from storage.block_format import HEADER_BYTES, Buffer, verify
from storage.remote.objects.calls import CalledOff, RemoteCalls
from storage.remote.objects.object_store import TEMPORARY_SUFFIX, StoredObject
from storage.remote.packs.catalog import (
    Drop,
    DropsGone,
    News,
    PackFound,
    PacksGone,
    new_drop_path,
)
from storage.remote.packs.format import (
    PackBuilder,
    PackClock,
    is_far_ahead,
    namespace_of,
    new_pack_path,
    now_ms,
    written_ms_of,
)
from storage.remote.packs.manifest import encode_manifest, manifest_path, sequence_of
from storage.remote.packs.pack import Pack
from storage.remote.settings import RemoteSettings
from storage.remote.upload_pacer import UploadPacer
from storage.remote.witness_keeper import FOLDER
from storage.tiers.contract import BlockCorrupt, BlockMissing

logger = logging.getLogger(__name__)

LIVE_PART_MIN = 0.5
"""Of a pack's bytes; with less the rest is written anew, and the pack goes."""
SMALL_PART = 0.25
"""A pack smaller than this part of a full one is merged with others, ..."""
MERGE_PACKS_MIN = 8
"""... if a namespace has so many."""
CAPACITY_PART = 0.95
"""How full a full store is after its oldest packs have gone."""
MANIFEST_PACKS_MIN = 16
MANIFEST_PART = 0.25
"""A new manifest is written when this part of the packs, at least so many, is not in one."""
DROP_KEPT_MS = 86_400_000
"""A drop stays so long at least: packs that were being written when it came are known by then."""
DROPS_AT_ONCE = 64
"""Looked at in one round."""
LEFTOVER_MS = 3_600_000
"""Temporary objects of writers that died go after so long."""
_LEASES = "upkeep/"

LiveRows = NDArray[np.int64]


class Rewrite(NamedTuple):
    """Live rows of packs of one namespace, to be written as one new pack."""

    sources: list[tuple[Pack, LiveRows]]


class UpkeepPlan(NamedTuple):
    """What one round of upkeep does."""

    delete: list[Pack]
    rewrites: list[Rewrite]
    manifest: list[Pack] | None
    """The packs that a new one is to hold; None: none is due."""
    drops: Mapping[str, Drop] = {}
    """By path: those that may be needless by now."""
    witnesses: Collection[str] = ()
    """Paths: those of namespaces that have no pack."""
    misdated: Mapping[str, Drop] = {}
    """By path: those to be written anew, or each start would take them for ones of then."""

    def __bool__(self) -> bool:
        parts = (self.delete, self.rewrites, self.drops, self.witnesses, self.misdated)
        return any(parts) or self.manifest is not None


def plan_upkeep(
    packs: Sequence[Pack],
    live_rows: Callable[[Pack], LiveRows],
    settings: RemoteSettings,
    now: int,
    manifest_ms: int,
) -> UpkeepPlan:
    """``packs``: all of them, the oldest first. ``live_rows``: those that the index locates
    in a pack. ``now``: ms since the epoch. ``manifest_ms``: packs named later are not in the
    latest manifest.
    """
    cutoff_ms = now - int(settings.ttl_s * 1000) if settings.ttl_s else 0
    delete = _oldest_beyond(packs, settings.capacity_bytes)
    rewritten: defaultdict[bytes, list[tuple[Pack, LiveRows]]] = defaultdict(list)
    kept = packs[len(delete) :]
    # A pack named in the far future could only be rewritten into one that counts less.
    kept = [pack for pack in kept if not is_far_ahead(written_ms_of(pack.path))]
    merged = _scattered(kept, int(SMALL_PART * settings.pack_bytes))
    for pack in kept:
        has_expired = len(pack.rows) and int(pack.rows["written_ms"].min()) < cutoff_ms
        is_dying = pack.live_bytes < LIVE_PART_MIN * pack.nbytes
        if not (has_expired or is_dying or pack.path in merged):
            continue
        rows = live_rows(pack)
        rows = rows[pack.rows["written_ms"][rows] >= cutoff_ms]
        if not len(rows):
            delete.append(pack)
        elif pack.path in merged or pack.stored_bytes(rows) < LIVE_PART_MIN * pack.nbytes:
            rewritten[namespace_of(pack.path)].append((pack, rows))
    rewrites = [
        Rewrite(group)
        for sources in rewritten.values()
        for group in _groups(sources, settings.pack_bytes)
    ]
    gone = {pack.path for pack in delete} | {p.path for r in rewrites for p, _ in r.sources}
    left = [pack for pack in packs if pack.path not in gone]
    named = [written_ms_of(pack.path) for pack in left]
    unknown = sum(ms > manifest_ms and not is_far_ahead(ms) for ms in named)
    is_due = unknown >= max(MANIFEST_PACKS_MIN, MANIFEST_PART * len(left))
    return UpkeepPlan(delete, rewrites, left if is_due else None)


def latest_manifest_ms(objects: Iterable[StoredObject]) -> int:
    """When the latest pack of the latest manifest was named; 0 without one."""
    sequences = (sequence_of(found.path) or 0 for found in objects)
    return max((ms for ms in sequences if not is_far_ahead(ms)), default=0)


def _oldest_beyond(packs: Sequence[Pack], capacity_bytes: int) -> list[Pack]:
    """Those that go, so that the others fit; none while they do."""
    excess_bytes = sum(pack.nbytes for pack in packs) - capacity_bytes
    if not capacity_bytes or excess_bytes <= 0:
        return []
    excess_bytes += math.ceil((1 - CAPACITY_PART) * capacity_bytes)
    gone: list[Pack] = []
    for pack in packs:
        if excess_bytes <= 0:
            break
        gone.append(pack)
        excess_bytes -= pack.nbytes
    return gone


def _scattered(packs: Iterable[Pack], small_bytes: int) -> set[str]:
    """Paths of small packs of namespaces that have many."""
    small: defaultdict[bytes, list[str]] = defaultdict(list)
    for pack in packs:
        if pack.nbytes < small_bytes:
            small[namespace_of(pack.path)].append(pack.path)
    return {path for paths in small.values() if len(paths) >= MERGE_PACKS_MIN for path in paths}


def _groups(
    sources: Iterable[tuple[Pack, LiveRows]], pack_bytes: int
) -> Iterator[list[tuple[Pack, LiveRows]]]:
    """Each as much as one pack holds, or a single source."""
    group: list[tuple[Pack, LiveRows]] = []
    group_bytes = 0
    for pack, rows in sources:
        nbytes = pack.stored_bytes(rows)
        if group and group_bytes + nbytes > pack_bytes:
            yield group
            group, group_bytes = [], 0
        group.append((pack, rows))
        group_bytes += nbytes
    if group:
        yield group


def old_drops(drops: Mapping[str, Drop], now: int) -> dict[str, Drop]:
    """Some that are so old that no block comes any more which they cover."""
    old = {path: d for path, d in drops.items() if d.before_ms < now - DROP_KEPT_MS}
    return dict(sorted(old.items())[:DROPS_AT_ONCE])


def needless(drops: Mapping[str, Drop], packs: Iterable[Pack]) -> list[str]:
    """Paths of the drops that cover no row of any pack."""
    first_ms: dict[BlockOwner, int] = {}
    for pack in packs:
        for label, written_ms in zip(pack.labels, pack.first_ms(), strict=True):
            owner = label.owner
            first_ms[owner] = min(written_ms, first_ms.get(owner, written_ms))
    return [
        path
        for path, drop in drops.items()
        if not any(
            (ms <= drop.before_ms or is_far_ahead(ms)) and drop.selector.value_of(o) is not None
            for o, ms in first_ms.items()
        )
    ]


def unused_witnesses(objects: Iterable[StoredObject], packs: Iterable[Pack]) -> set[str]:
    """Paths of the witnesses of namespaces without a pack."""
    used = {FOLDER + namespace_of(pack.path).hex() for pack in packs}
    return {found.path for found in objects if found.path.startswith(FOLDER)} - used


def write_drop(calls: RemoteCalls, path: str, drop: Drop) -> None:
    """For every process that shares the store, and those to come."""
    calls.write(path, lambda: [msgspec.json.encode(drop)])


class PackUpkeep:
    """Carries plans out in a thread of its own, and writes drops.

    ``report`` is called there with the packs that come and go. Of all processes that share the
    store one works in each period: the one that creates the period's lease. Where a store has
    no conditional writes several may, which costs bytes and harms nothing.
    """

    def __init__(
        self,
        calls: RemoteCalls,
        pacer: UploadPacer,
        clock: PackClock,
        settings: RemoteSettings,
        report: Callable[[News], None],
    ) -> None:
        self._calls = calls
        self._pacer = pacer
        self._clock = clock
        self._settings = settings
        self._report = report
        self.is_busy = False
        """A plan is being carried out, or waits to be."""
        self.has_lease = False
        """The last plan was carried out here, and not by another process."""
        self._unused_since: dict[str, float] = {}
        """Witnesses of namespaces without a pack, with a monotonic time."""
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="remote-upkeep", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """What was begun is ended, if that takes no longer."""
        self._work.put(None)
        self._thread.join(timeout_s)

    def submit(self, plan: UpkeepPlan, objects: list[StoredObject], packs: Sequence[Pack]) -> None:
        """``objects``: the latest listing; ``packs``: all of them."""
        self.is_busy = True
        self._work.put(lambda: self._carry_out(plan, objects, packs))

    def write_drop(self, path: str, drop: Drop) -> None:
        """For the other processes, and the next ones."""
        self._work.put(lambda: write_drop(self._calls, path, drop))

    # ---- the thread -------------------------------------------------------------------

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except Exception as error:  # of any store's library; the next round does the rest
                logger.warning("upkeep of the remote tier: %s", error)

    def _carry_out(
        self, plan: UpkeepPlan, objects: list[StoredObject], packs: Sequence[Pack]
    ) -> None:
        try:
            self.has_lease = self._get_lease(objects)
            if self.has_lease:
                for rewrite in plan.rewrites:
                    self._rewrite(rewrite)
                self._delete([pack.path for pack in plan.delete])
                if plan.manifest is not None:
                    self._write_manifest(plan.manifest, objects)
                for drop in plan.misdated.values():
                    write_drop(self._calls, new_drop_path(drop), drop)
                self._delete_drops(list(plan.misdated))
                self._delete_drops(needless(plan.drops, packs))
                self._clean(objects)
                self._clean_witnesses(plan.witnesses)
        finally:
            self.is_busy = False

    def _get_lease(self, objects: Iterable[StoredObject]) -> bool:
        period = f"{_LEASES}{int(now_ms() / 1000 / self._settings.upkeep_s):012x}"
        if not self._calls.create(period, b""):
            return False
        for found in objects:
            if found.path.startswith(_LEASES) and found.path < period:
                self._calls.delete(found.path)
        return True

    def _delete(self, paths: Sequence[str]) -> None:
        for path in paths:
            self._calls.delete(path)
        if paths:
            self._report(PacksGone(list(paths)))

    def _delete_drops(self, paths: list[str]) -> None:
        for path in paths:
            self._calls.delete(path)
        if paths:
            self._report(DropsGone(paths))

    def _rewrite(self, rewrite: Rewrite) -> None:
        """The new pack is there before the old ones go."""
        namespace_digest = namespace_of(rewrite.sources[0][0].path)
        path = new_pack_path(namespace_digest, self._clock.next_ms())
        copy = _Copy(rewrite, self._calls, self._pacer)

        def attempt() -> Iterator[Buffer]:
            nonlocal copy
            copy = _Copy(rewrite, self._calls, self._pacer)
            return copy.parts()

        try:
            self._calls.write(path, attempt)
        except CalledOff:
            pass  # no block was whole
        except FileNotFoundError:
            return  # another process was faster
        else:
            self._report(PackFound(Pack(path, copy.nbytes, copy.builder.contents)))
        self._delete([pack.path for pack, _ in rewrite.sources])

    def _write_manifest(self, packs: list[Pack], objects: Iterable[StoredObject]) -> None:
        data = encode_manifest(packs)
        earlier = sorted(found.path for found in objects if sequence_of(found.path) is not None)
        named = (written_ms_of(pack.path) for pack in packs)
        sequence = max((ms for ms in named if not is_far_ahead(ms)), default=now_ms())
        self._pacer.wait_turn(len(data))
        self._calls.write(manifest_path(sequence, data), lambda: [data])
        for path in earlier[:-1]:  # the last one may be being read
            self._calls.delete(path)

    def _clean(self, objects: Iterable[StoredObject]) -> None:
        for found in objects:
            path, _, suffix = found.path.partition(".pack.")
            if suffix.endswith(TEMPORARY_SUFFIX) and written_ms_of(path) < now_ms() - LEFTOVER_MS:
                self._calls.delete(found.path)

    def _clean_witnesses(self, unused: Iterable[str]) -> None:
        """Those of namespaces that have had no pack for so long that none is on its way."""
        now = time.monotonic()
        self._unused_since = {path: self._unused_since.get(path, now) for path in unused}
        for path, since in self._unused_since.items():
            if now - since > LEFTOVER_MS / 1000:
                self._calls.delete(path)


class _Copy:
    """The bytes of a new pack, verified block by block out of the old ones."""

    def __init__(self, rewrite: Rewrite, calls: RemoteCalls, pacer: UploadPacer) -> None:
        self._rewrite = rewrite
        self._calls = calls
        self._pacer = pacer
        self.builder = PackBuilder()
        self.nbytes = 0

    def parts(self) -> Iterator[Buffer]:
        """Raises CalledOff if no block is whole."""
        for part in self._blocks():
            self.nbytes += len(part)
            yield part
        if not len(self.builder):
            raise CalledOff("no block is whole")
        footer = self.builder.footer()
        self.nbytes += len(footer)
        yield footer

    def _blocks(self) -> Iterator[Buffer]:
        for pack, rows in self._rewrite.sources:
            for row in rows.tolist():
                start, nbytes = pack.span(row)
                self._pacer.wait_turn(nbytes)
                stored = memoryview(self._calls.read(pack.path, start, nbytes))
                header, payload, key = stored[:HEADER_BYTES], stored[HEADER_BYTES:], pack.key(row)
                try:
                    label = verify(header, payload, key).label
                except (BlockCorrupt, BlockMissing) as error:
                    logger.warning("a block of %s is left behind: %s", pack.path, error)
                    continue
                written_ms = int(pack.rows["written_ms"][row])
                self.builder.add(key, len(payload), written_ms, label)
                yield stored
