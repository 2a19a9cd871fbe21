"""The packs that a remote tier knows, and so the places where its blocks lie."""

from __future__ import annotations

from collections.abc import Iterator

from common.block import BlockKey
from storage.block_format import HEADER_BYTES
from storage.remote.packs.pack import Pack, split_place
from storage.tiers.placement import TOLD_LATER
from storage.tiers.room import Room


class KnownPacks:
    """Packs by path and by number, the oldest first. Belongs to the tier's owner.

    A :class:`storage.tiers.placement.Placement`: pack and row make the place's number. What is
    written gets a place when its pack is known; until then, and for what is evicted, nothing
    but the number of a pack's live blocks changes.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._by_path: dict[str, Pack] = {}
        self._by_number: dict[int, Pack] = {}

    def __len__(self) -> int:
        return len(self._by_path)

    def __contains__(self, path: str) -> bool:
        return path in self._by_path

    def __iter__(self) -> Iterator[Pack]:
        """The oldest first."""
        return iter(sorted(self._by_path.values(), key=lambda pack: pack.order))

    def get(self, path: str) -> Pack | None:
        return self._by_path.get(path)

    def add(self, pack: Pack) -> None:
        """A pack with a number of its own."""
        self._by_path[pack.path] = self._by_number[pack.number] = pack
        self.used_bytes += pack.nbytes

    def remove(self, pack: Pack) -> None:
        """No block may be located in it any more."""
        del self._by_path[pack.path], self._by_number[pack.number]
        self.used_bytes -= pack.nbytes

    def at(self, place: int) -> tuple[Pack, int]:
        """Pack and row."""
        number, row = split_place(place)
        return self._by_number[number], row

    def count_live(self, place: int, blocks: int) -> None:
        """The index locates one block more (1) or less (-1) in this place."""
        pack, row = self.at(place)
        pack.live_blocks += blocks
        pack.live_bytes += blocks * pack.span(row)[1]

    # ---- the placement ----------------------------------------------------------------

    def stored_bytes(self, nbytes: int) -> int:
        return HEADER_BYTES + nbytes

    def bytes_at(self, place: int) -> int:
        pack, row = self.at(place)
        return pack.span(row)[1]

    def reserve(self, nbytes: int, room: Room) -> int | None:
        return TOLD_LATER

    def release(self, place: int) -> None:
        self.count_live(place, -1)

    def erase(self, key: BlockKey) -> None:
        """Its bytes stay until its pack is rewritten."""
