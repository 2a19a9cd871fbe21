"""Finds and damages blocks in an SSD folder from outside, by what the blocks say."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from common.block import BlockKey
from storage.block_format import HEADER_BYTES, decode_header
from storage.ssd.slab_table import table_bytes_for
from storage.tiers.contract import BlockCorrupt, BlockMissing


class Place(NamedTuple):
    path: Path
    offset: int
    slot_bytes: int


def stored(folder: Path) -> Iterator[tuple[BlockKey, Place]]:
    """Every slot with a right header."""
    for path in sorted(folder.rglob("*.slab")):
        slot_bytes = slot_bytes_of(path)
        with path.open("rb") as file:
            for offset in range(table_bytes_of(path), path.stat().st_size, slot_bytes):
                file.seek(offset)
                try:
                    header = decode_header(file.read(HEADER_BYTES))
                except (BlockCorrupt, BlockMissing):
                    continue
                yield header.key, Place(path, offset, slot_bytes)


def _sizes(slab: Path) -> tuple[int, int]:
    slot_bytes, num_slots = slab.stem.split("-")[1].split("x")
    return int(slot_bytes), int(num_slots)


def slot_bytes_of(slab: Path) -> int:
    return _sizes(slab)[0]


def table_bytes_of(slab: Path) -> int:
    """The table's, with which the file begins."""
    return table_bytes_for(_sizes(slab)[1])


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


def lose_tables(folder: Path) -> None:
    """Nothing in the tables is right any more: a start has only the headers."""
    for slab in folder.glob("*.slab"):
        overwrite(slab, 0, b"\xff" * table_bytes_of(slab))


def slow_down(monkeypatch: pytest.MonkeyPatch, folder: Path) -> threading.Event:
    """What is read, written and synced in the folder's slabs waits for the event, up to 10 s."""
    gate = threading.Event()
    for name in ("preadv", "pwritev", "fdatasync"):
        real = getattr(os, name)

        def waiting(fd: int, *arguments: object, real: Callable[..., int] = real) -> int:
            if os.readlink(f"/proc/self/fd/{fd}").startswith(str(folder)):
                gate.wait(10)
            return real(fd, *arguments)

        monkeypatch.setattr(os, name, waiting)
    return gate
