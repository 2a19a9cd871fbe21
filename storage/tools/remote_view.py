"""A remote store seen from outside. Agents go on using it, whatever is done here."""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from common.block import BlockKey
from common.json import JsonObject
from common.sizes import format_size
from storage.block_format import HEADER_BYTES, BlockHeader, verify
from storage.index.owners import Selector
from storage.remote.objects.calls import RemoteCalls
from storage.remote.objects.object_store import RemoteUnusable, StoredObject
from storage.remote.objects.open_store import open_store
from storage.remote.packs.catalog import (
    Drop,
    DropFound,
    DropsGone,
    News,
    PackCatalog,
    PackFound,
    PacksGone,
    Refreshed,
    dropped_before_ms,
    is_left,
    knows_all,
    misdated,
    new_drop_path,
)
from storage.remote.packs.format import PackClock, now_ms, written_ms_of
from storage.remote.packs.pack import Pack
from storage.remote.packs.upkeep import (
    LiveRows,
    PackUpkeep,
    latest_manifest_ms,
    old_drops,
    plan_upkeep,
    write_drop,
)
from storage.remote.settings import RemoteSettings
from storage.remote.tier import RemoteTier
from storage.remote.upload_pacer import UploadPacer
from storage.tiers.contract import BlockMissing
from storage.tools.finding import Finding, Findings, Verdict
from storage.tools.view import StoredBlock, StoreSummary, StoreUnusable

LOOK_S_MAX = 600.0
UPKEEP_S_MAX = 3600.0
CLOSE_S = 3.0
LINGER_S = 0.1
"""For packs that are copied: nothing else comes to fill them."""
DEAD_PART = 0.5
"""More dead bytes than this part are worth a warning."""


class _Look:
    """What one look at the store has found, the oldest pack first. Raises
    :class:`StoreUnusable`."""

    def __init__(self, url: str, calls: RemoteCalls) -> None:
        self.packs: list[Pack] = []
        self.objects: list[StoredObject] = []
        self.unreadable = 0
        """Packs."""
        self.drops: dict[str, Drop] = {}
        """By path."""
        news: queue.SimpleQueue[News] = queue.SimpleQueue()
        catalog = PackCatalog(calls, news.put, refresh_s=LOOK_S_MAX)
        end = time.monotonic() + LOOK_S_MAX
        try:
            while not self._note(news.get(timeout=max(0.0, end - time.monotonic()))):
                pass
        except queue.Empty:
            raise StoreUnusable(f"{url}: no answer within {LOOK_S_MAX:g} s") from None
        finally:
            self.unreadable = catalog.unreadable_packs_total
            catalog.close(CLOSE_S)
        self.packs.sort(key=lambda pack: pack.order)

    def _note(self, news: News) -> bool:
        """True with the last of them."""
        if isinstance(news, PackFound):
            self.packs.append(news.pack)
        elif isinstance(news, DropFound):
            self.drops[news.path] = news.drop
        elif isinstance(news, Refreshed):
            self.objects = news.objects
            return True
        return False

    def live(self) -> dict[str, list[int]]:
        """Rows that an agent would read, by pack: of two copies the later one."""
        located: dict[BlockKey, tuple[str, int]] = {}
        for pack in self.packs:
            drops = self.drops.values()
            dead = np.array([dropped_before_ms(drops, label) for label in pack.labels], np.int64)
            left = is_left(pack.rows["written_ms"].astype(np.int64), dead[pack.rows["label"]])
            for row, (key, is_here) in enumerate(zip(pack.keys(), left.tolist(), strict=True)):
                if is_here:
                    located[key] = pack.path, row
        rows: dict[str, list[int]] = {pack.path: [] for pack in self.packs}
        for path, row in located.values():
            rows[path].append(row)
        return rows


class RemoteView:
    """What lies below a URL now. Raises :class:`StoreUnusable`."""

    def __init__(self, url: str, options: Mapping[str, object]) -> None:
        self.url = url
        self._settings = RemoteSettings()
        try:
            store = open_store(url, options, self._settings.timeout_s, read_only=True)
        except RemoteUnusable as error:
            raise StoreUnusable(str(error)) from error
        self._options = options
        self._calls = RemoteCalls(store, self._settings.timeout_s)
        look = _Look(url, self._calls)
        self._packs, self._objects = look.packs, look.objects
        self._unreadable = look.unreadable
        self._rows = look.live()
        self._drops = look.drops
        self._clock = PackClock()
        for pack in self._packs:
            self._clock.see(written_ms_of(pack.path))
            self._clock.see_rows(pack.rows)

    # ---- blocks -----------------------------------------------------------------------

    def summary(self) -> StoreSummary:
        manifest_ms = latest_manifest_ms(self._objects)
        return StoreSummary(
            url=self.url,
            kind="remote",
            used_by=None,
            notes={
                "packs": str(len(self._packs)),
                "pack bytes": format_size(sum(pack.nbytes for pack in self._packs)),
                "live bytes": format_size(self._live_bytes()),
                "manifest": f"of {manifest_ms} ms since 1970" if manifest_ms else "none yet",
            },
        )

    def _live_bytes(self) -> int:
        return sum(pack.stored_bytes(self._live_rows(pack)) for pack in self._packs)

    def blocks(self) -> Iterator[StoredBlock]:
        for number, pack in enumerate(self._packs):
            for row in sorted(self._rows[pack.path]):
                start, nbytes = pack.span(row)
                yield StoredBlock(
                    key=pack.key(row),
                    label=pack.label(row),
                    payload_bytes=nbytes - HEADER_BYTES,
                    written_ms=int(pack.rows["written_ms"][row]),
                    where=f"{pack.path} at {start}",
                    place=(number, row),
                )

    def read(self, block: StoredBlock) -> tuple[BlockHeader, memoryview]:
        stored = self._stored(block)
        payload = stored[HEADER_BYTES:]
        return verify(stored[:HEADER_BYTES], payload, block.key), payload

    def read_plain(self, block: StoredBlock) -> None:
        self._stored(block)

    def _stored(self, block: StoredBlock) -> memoryview:
        number, row = block.place
        pack = self._packs[number]
        try:
            return memoryview(self._calls.read(pack.path, *pack.span(row)))
        except FileNotFoundError as error:
            raise BlockMissing(f"{pack.path} was rewritten or has gone meanwhile") from error

    # ---- the rest -----------------------------------------------------------------------

    def findings(self) -> Findings:
        yield Finding("process", Verdict.GOOD, "shared: any number of agents may use it")
        yield Finding("format", Verdict.GOOD, f"{len(self._packs)} packs")
        if self._unreadable:
            found = f"{self._unreadable} packs are damaged or of another version"
            advice = "update this program, or let --remote-ttl-s or the bucket's rules remove them"
            yield Finding("packs", Verdict.BAD, found, advice)
        total_bytes = sum(pack.nbytes for pack in self._packs)
        dead_bytes = total_bytes - self._live_bytes()
        found = f"{format_size(dead_bytes)} of {format_size(total_bytes)} are dead"
        is_much = dead_bytes > DEAD_PART * total_bytes
        advice = "no agent has done upkeep lately: storage.cli gc does it" if is_much else ""
        yield Finding("dead bytes", Verdict.DOUBTFUL if is_much else Verdict.GOOD, found, advice)

    def counters(self) -> JsonObject | None:
        return None

    def open_tier(self, capacity_bytes: int = 0) -> RemoteTier:
        return open_remote_tier(self.url, self._options)

    def drop(self, selector: Selector) -> str:
        drop = Drop(selector, self._clock.next_ms())
        write_drop(self._calls, new_drop_path(drop), drop)
        return f"noted; agents see it within {self._settings.refresh_s:g} s"

    def collect(self) -> dict[str, int]:
        """One round of the agents' own upkeep; none if one of them is at it."""
        for pack in self._packs:
            pack.live_blocks = len(self._rows[pack.path])
            pack.live_bytes = pack.stored_bytes(self._live_rows(pack))
        manifest_ms, now = latest_manifest_ms(self._objects), now_ms()
        plan = plan_upkeep(self._packs, self._live_rows, self._settings, now, manifest_ms)
        plan = plan._replace(misdated=misdated(self._drops))
        if knows_all(self._objects, self._packs):
            plan = plan._replace(drops=old_drops(self._drops, now))
        if not plan:
            return {}
        done: Counter[str] = Counter()
        news: queue.SimpleQueue[News] = queue.SimpleQueue()
        upkeep = PackUpkeep(self._calls, UploadPacer(), self._clock, self._settings, news.put)
        upkeep.submit(plan, self._objects, self._packs)
        upkeep.close(UPKEEP_S_MAX)
        if not upkeep.has_lease:
            raise StoreUnusable(f"{self.url}: an agent is doing upkeep in this minute")
        while not news.empty():
            found = news.get()
            if isinstance(found, PackFound):
                done["packs written"] += 1
            elif isinstance(found, PacksGone):
                done["packs deleted"] += len(found.paths)
            elif isinstance(found, DropsGone):
                done["drops deleted"] += len(found.paths)
        done["manifests written"] += plan.manifest is not None
        return dict(done)

    def _live_rows(self, pack: Pack) -> LiveRows:
        return np.array(sorted(self._rows[pack.path]), np.int64)

    def close(self) -> None:
        self._calls.close(CLOSE_S)


def open_remote_tier(url: str, options: Mapping[str, object]) -> RemoteTier:
    """For writes, made if there is none; :class:`StoreUnusable` says why not."""
    try:
        tier = RemoteTier(url, options, lambda: None, RemoteSettings(linger_s=LINGER_S))
    except RemoteUnusable as error:
        raise StoreUnusable(str(error)) from error
    end = time.monotonic() + LOOK_S_MAX
    while not tier.has_looked:
        tier.poll()
        if time.monotonic() > end:
            tier.close()
            raise StoreUnusable(f"{url}: no answer within {LOOK_S_MAX:g} s")
        time.sleep(0.01)
    tier.take_changes()
    return tier
