"""Packs as files of a folder, for tests that look into them or damage them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from common.block import BlockKey
from storage.remote.packs.format import TRAILER_BYTES, decode_footer, footer_bytes
from storage.remote.packs.pack import Pack
from storage.tiers.contract import PackStats, Tier


class Place(NamedTuple):
    """Where a block's header begins, and what header and payload take."""

    path: Path
    offset: int
    nbytes: int


def packs_in(root: Path) -> list[Path]:
    """The oldest first."""
    return sorted((root / "packs").rglob("*.pack"), key=lambda path: path.name)


def read_pack(root: Path, path: Path) -> Pack:
    data = path.read_bytes()
    length = footer_bytes(data[-TRAILER_BYTES:], len(data))
    contents = decode_footer(data[-length:], len(data))
    return Pack(str(path.relative_to(root)), len(data), contents)


def places_in(root: Path) -> dict[BlockKey, list[Place]]:
    """Of every block in every pack, in the oldest pack first."""
    places: dict[BlockKey, list[Place]] = {}
    for path in packs_in(root):
        pack = read_pack(root, path)
        for row, key in enumerate(pack.keys()):
            places.setdefault(key, []).append(Place(path, *pack.span(row)))
    return places


def flip(place: Place, at: int) -> None:
    """Change one bit of a block; negative ``at`` counts from its end."""
    data = bytearray(place.path.read_bytes())
    data[place.offset + (at if at >= 0 else place.nbytes + at)] ^= 1
    place.path.write_bytes(data)


def pack_stats(tier: Tier) -> PackStats:
    """What only a remote tier counts."""
    packs = tier.stats().packs
    assert packs is not None
    return packs
