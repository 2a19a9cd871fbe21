"""What an SSD folder notes beside its slabs: owners, drops, and requests to drop.

Each file has a JSON object a line. A line that a crash has cut is skipped: what it would
have said was not relied on yet.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from common.block import BlockOwner
from common.user_files import PRIVATE_FILE
from storage.index.owners import Selector
from storage.ssd.direct_io import sync_folder
from storage.tiers.contract import TierStats

T = TypeVar("T", bound=msgspec.Struct)
_REQUESTS = "drop-*.request"


class Drop(msgspec.Struct, frozen=True):
    """Blocks of these owners are gone if they were written before this sequence."""

    selector: Selector
    sequence: int


class Counters(msgspec.Struct, frozen=True):
    """What the tier counted until ``at_ms`` (since 1970); for who looks at the folder."""

    at_ms: int
    process: int
    stats: dict[str, object]
    """Of all parts of its TierStats, by name."""

    def part(self, kind: type[T]) -> T:
        """One part, such as RoomStats."""
        return msgspec.convert(self.stats, kind)


class FolderNotes:
    """May be read beside the process that owns the folder. Raises OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._owners = folder / "owners"
        self._drops = folder / "drops"
        self._counters = folder / "counters"

    def owners(self) -> list[BlockOwner]:
        """Of the blocks of this folder, now or once."""
        return list(_lines(self._owners, BlockOwner))

    def add_owners(self, owners: Iterable[BlockOwner]) -> None:
        """Durably."""
        _append(self._owners, owners)

    def rewrite_owners(self, owners: Iterable[BlockOwner]) -> None:
        """These and no others, durably."""
        _rewrite(self._owners, owners)

    def drops(self) -> list[Drop]:
        """Blocks that these cover are not to be found again."""
        return list(_lines(self._drops, Drop))

    def add_drop(self, drop: Drop) -> None:
        """Durably."""
        _append(self._drops, [drop])

    def rewrite_drops(self, drops: Iterable[Drop]) -> None:
        """These and no others, durably."""
        _rewrite(self._drops, drops)

    def counters(self) -> Counters | None:
        """The last that the tier noted; None if it noted none."""
        return next(_lines(self._counters, Counters), None)

    def note_counters(self, stats: TierStats) -> None:
        """Seen as a whole or not at all; not durable."""
        parts = (stats.room, stats.io, stats.devices, stats.packs)
        named = {
            name: value
            for part in parts
            if part is not None
            for name, value in msgspec.structs.asdict(part).items()
        }
        counters = Counters(time.time_ns() // 1_000_000, os.getpid(), named)
        temporary = self._counters.with_suffix(".new")
        temporary.write_bytes(msgspec.json.encode(counters))
        temporary.rename(self._counters)

    # ---- requests to whoever owns the folder, now or next -----------------------------------

    def request_drop(self, selector: Selector) -> Path:
        """Ask for a drop; the file goes when it has been done."""
        path = self._folder / f"drop-{uuid.uuid4().hex}.request"
        temporary = path.with_suffix(".new")
        temporary.write_bytes(msgspec.json.encode(selector))
        temporary.rename(path)
        return path

    def requests(self) -> list[tuple[Path, Selector]]:
        """Open ones; the owner removes each file once it has done what it asks."""
        found = []
        for path in sorted(self._folder.glob(_REQUESTS)):
            found += [(path, selector) for selector in _lines(path, Selector)]
        return found


def _lines(path: Path, kind: type[T]) -> Iterator[T]:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            yield msgspec.json.decode(line, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue


def _append(path: Path, entries: Iterable[msgspec.Struct]) -> None:
    is_new = not path.exists()
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, PRIVATE_FILE)
    try:
        # the leading line end closes a line that a crash has cut
        os.write(fd, b"".join(b"\n" + msgspec.json.encode(entry) for entry in entries) + b"\n")
        os.fsync(fd)
    finally:
        os.close(fd)
    if is_new:
        sync_folder(path.parent)


def _rewrite(path: Path, entries: Iterable[msgspec.Struct]) -> None:
    """Seen as a whole or not at all."""
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    _append(temporary, entries)
    temporary.rename(path)
    sync_folder(path.parent)
