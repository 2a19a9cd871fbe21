"""What looks at the store have found, into the index of the tier: bit by bit, in its owner's
thread."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from common.block import BlockKey, BlockLabel
from storage.index.owners import Selector
from storage.remote.objects.object_store import StoredObject
from storage.remote.packs.catalog import (
    Drop,
    DropFound,
    DropsGone,
    News,
    PackFound,
    PacksGone,
    dropped_before_ms,
    is_left,
)
from storage.remote.packs.format import PackClock, written_ms_of
from storage.remote.packs.known import KnownPacks
from storage.remote.packs.pack import Pack
from storage.remote.packs.upkeep import LiveRows
from storage.tiers.room import Room

logger = logging.getLogger(__name__)

ADOPT_ROWS = 512
"""Blocks that are indexed at once."""
ADOPT_S = 0.005
"""Spent on that at a time, so that the owner is not kept."""
_DONE = object()


class PackIndexer:
    """``report`` and ``written`` are for any thread; the rest belongs to the owner.

    ``blocks_max``: beyond that the oldest packs are not used.
    """

    def __init__(
        self,
        packs: KnownPacks,
        room: Room,
        clock: PackClock,
        blocks_max: int,
        wake: Callable[[], None],
    ) -> None:
        self.looks = 0
        """Number of the last look that is in the index."""
        self.objects: list[StoredObject] = []
        """The latest listing of the store."""
        self._packs = packs
        self._room = room
        self._held = room.held
        self._clock = clock
        self._blocks_max = blocks_max
        self._wake = wake
        self._numbers = itertools.count()
        self._drops: dict[str, Drop] = {}
        """By the paths of their objects, which upkeep takes away."""
        self._new_drops: list[Selector] = []
        """Of other processes, not taken yet."""
        self._own_packs: deque[Pack] = deque()
        """Just written here, not in the index yet."""
        self._news: deque[News] = deque()
        self._adopting: Iterator[None] | None = None

    def report(self, news: News) -> None:
        """Something has come or gone."""
        self._news.append(news)
        self._wake()

    def written(self, pack: Pack) -> None:
        """This process has stored a pack."""
        self._own_packs.append(pack)

    @property
    def knows_all(self) -> bool:
        """All that was found is in the index, or has gone from it again."""
        return self.looks > 0 and self._adopting is None and not self._news

    def live_rows(self, pack: Pack) -> LiveRows:
        """Those that the index locates in the pack."""
        keys = enumerate(pack.keys())
        live = [row for row, key in keys if self._held.get(key) == pack.place(row)]
        return np.array(live, np.int64)

    @property
    def drops(self) -> Mapping[str, Drop]:
        """Those in force, by the paths of their objects."""
        return self._drops

    def drop(self, path: str, drop: Drop) -> None:
        """What comes from packs, and was written by then, stays away."""
        self._drops[path] = drop

    def take_drops(self) -> list[Selector]:
        """Of other processes, since the last call."""
        drops, self._new_drops = self._new_drops, []
        return drops

    def forget(self, pack: Pack) -> None:
        """The pack is gone, or not used any more."""
        for key in self._held.index.between(pack.place(0), pack.place(len(pack.rows))):
            self._room.lose(key)
        self._packs.remove(pack)

    # ---- adoption -----------------------------------------------------------------------

    def adopt_own(self) -> None:
        """All that was written here."""
        while self._own_packs:
            for _ in self._adopt_pack(self._own_packs.popleft()):
                pass

    def adopt_news(self) -> bool:
        """For about ``ADOPT_S``; True if there is more."""
        end = time.monotonic() + ADOPT_S
        while self._adopting is not None or self._news:
            if time.monotonic() > end:
                return True
            if self._adopting is None:
                self._adopting = self._adopt(self._news.popleft())
            if next(self._adopting, _DONE) is _DONE:
                self._adopting = None
        return False

    def _adopt(self, news: News) -> Iterator[None]:
        """Yields after each part."""
        if isinstance(news, PackFound):
            yield from self._adopt_pack(news.pack)
        elif isinstance(news, PacksGone):
            for path in news.paths:
                if (pack := self._packs.get(path)) is not None:
                    self.forget(pack)
                    yield
        elif isinstance(news, DropFound):
            if news.path not in self._drops:
                yield from self._adopt_drop(news.path, news.drop)
        elif isinstance(news, DropsGone):
            for path in news.paths:
                self._drops.pop(path, None)
        else:
            self.looks, self.objects = news.number, news.objects

    def _adopt_drop(self, path: str, drop: Drop) -> Iterator[None]:
        self._clock.see(drop.before_ms)  # what is written here from now on is later
        self._drops[path] = drop
        self._new_drops.append(drop.selector)
        self._held.drop(drop.selector)
        for pack in self._packs:  # what was written after it stays
            owners = (label.owner for label in pack.labels)
            is_dropped = any(drop.selector.value_of(owner) is not None for owner in owners)
            if is_dropped and int(pack.rows["written_ms"].max()) > drop.before_ms:
                yield from self._index_pack(pack)

    def _adopt_pack(self, pack: Pack) -> Iterator[None]:
        if pack.path in self._packs:
            return
        pack.number = next(self._numbers)
        if not self._clock.see(written_ms_of(pack.path)):
            logger.warning(
                "%s was named more than an hour ahead of this host's clock, which does not "
                "follow it: is a clock wrong here or there?",
                pack.path,
            )
        self._clock.see_rows(pack.rows)
        self._packs.add(pack)
        yield from self._index_pack(pack)
        while len(self._held) > self._blocks_max and len(self._packs) > 1:
            logger.warning("the remote tier holds more blocks than the index may: oldest unused")
            self.forget(next(iter(self._packs)))

    def _index_pack(self, pack: Pack) -> Iterator[None]:
        """Its blocks but for dropped ones, and those of which a later pack has a copy."""
        drops = self._drops.values()
        dead_before_ms = [dropped_before_ms(drops, label) for label in pack.labels]
        rows, keys = pack.rows, pack.keys()
        for number, label in enumerate(pack.labels):
            is_wanted = rows["label"] == number
            is_wanted &= is_left(rows["written_ms"].astype(np.int64), dead_before_ms[number])
            wanted = np.flatnonzero(is_wanted)
            for first in range(0, len(wanted), ADOPT_ROWS):
                if pack.path not in self._packs:
                    return  # it has gone meanwhile
                part = {keys[row]: row for row in wanted[first : first + ADOPT_ROWS].tolist()}
                self._gain(pack, part, label)
                yield

    def _gain(self, pack: Pack, located: dict[BlockKey, int], label: BlockLabel) -> None:
        """Blocks of a pack by their rows; most are new. Of a block in two packs the later one
        counts, for every process alike."""
        held, packs = self._held, self._packs
        for key in [key for key in located if key in held.index]:
            place, held_at = pack.place(located.pop(key)), held.get(key)
            if held_at is None or packs.at(held_at)[0].order < pack.order:
                self._room.lose(key)
                held.add(key, place, label)
                packs.count_live(place, 1)
        rows = np.fromiter(located.values(), np.int64, len(located))
        nbytes = pack.stored_bytes(rows)
        held.add_many(list(located), pack.place(0) + rows, nbytes, label)
        pack.live_blocks += len(located)
        pack.live_bytes += nbytes
