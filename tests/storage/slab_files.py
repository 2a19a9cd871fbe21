"""Finds and damages blocks in an SSD folder from outside, by what the blocks say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from storage.block import BlockKey
from storage.block_format import HEADER_BYTES, decode_header
from storage.tier import BlockCorrupt, BlockMissing


class Place(NamedTuple):
    path: Path
    offset: int
    slot_bytes: int


def stored(folder: Path) -> Iterator[tuple[BlockKey, Place]]:
    """Every slot with a right header."""
    for path in sorted(folder.rglob("*.slab")):
        slot_bytes = int(path.stem.split("-")[1])
        with path.open("rb") as file:
            for offset in range(0, path.stat().st_size, slot_bytes):
                file.seek(offset)
                try:
                    header = decode_header(file.read(HEADER_BYTES))
                except (BlockCorrupt, BlockMissing):
                    continue
                yield header.key, Place(path, offset, slot_bytes)


def place_of(folder: Path, key: BlockKey) -> Place:
    return dict(stored(folder))[key]


def flip(path: Path, position: int, mask: int = 4) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ mask]))


def overwrite(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)


def read_place(place: Place) -> bytes:
    with place.path.open("rb") as file:
        file.seek(place.offset)
        return file.read(place.slot_bytes)


def cut_power(folder: Path) -> None:
    """As if the machine had gone down: what the page cache held of the tables is lost."""
    for table in folder.glob("*.slots"):
        table.write_bytes(bytes(table.stat().st_size))
    state = msgspec.json.decode((folder / "state").read_bytes())
    state |= {"boot_id": "of an earlier life", "is_closed": False}
    (folder / "state").write_bytes(msgspec.json.encode(state))
