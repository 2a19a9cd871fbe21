"""The packs that a remote tier knows."""

from __future__ import annotations

from collections.abc import Iterator

from storage.remote.packs.pack import Pack, split_place


class PackBook:
    """Packs by path and by number. Belongs to the tier's owner."""

    def __init__(self) -> None:
        self._by_path: dict[str, Pack] = {}
        self._by_number: dict[int, Pack] = {}
        self.used_bytes = 0

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

    def bytes_at(self, place: int) -> int:
        pack, row = self.at(place)
        return pack.span(row)[1]

    def count_live(self, place: int, blocks: int) -> None:
        """The index locates one block more (1) or less (-1) in this place."""
        pack, row = self.at(place)
        pack.live_blocks += blocks
        pack.live_bytes += blocks * pack.span(row)[1]
