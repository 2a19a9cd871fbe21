"""Blocks in slots of one disk: damage, eviction, durability, restart."""

from __future__ import annotations

import errno
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.block import BlockKey, BlockLabel, BlockLayout, TierName
from common.messages.from_agents import Holding
from storage.block_format import HEADER_BYTES, decode_header
from storage.ssd.direct_io import PAGE_BYTES
from storage.ssd.folder import FORMAT
from storage.ssd.slab import slot_bytes_for
from storage.ssd.slab_table import table_bytes_for
from storage.ssd.tier import DirectoryLocked, DirectoryUnusable, SsdTier
from storage.tiers.contract import BlockCorrupt, BlockIO, BlockMissing, TierFull
from tests.storage.conftest import (
    BLOCK_BYTES,
    finish,
    key_of,
    no_wake,
    payload_of,
    read,
    settle,
    write,
)
from tests.storage.ssd.slab_files import flip, lose_tables, overwrite, place_of, read_place, stored

SLOT_BYTES = slot_bytes_for(BLOCK_BYTES)
OpenSsd = Callable[..., SsdTier]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "ssd"


@pytest.fixture
def open_ssd(directory: Path, closing: Callable[[SsdTier], SsdTier]) -> OpenSsd:
    def open_with(blocks: int = 100) -> SsdTier:
        return closing(SsdTier(directory, blocks * SLOT_BYTES, no_wake, threads=4))

    return open_with


def _damage(directory: Path, key: BlockKey, how: str) -> None:
    path, offset, _ = place_of(directory, key)
    if how == "payload bit":
        flip(path, offset + HEADER_BYTES + 77)
    elif how == "last payload bit":
        flip(path, offset + HEADER_BYTES + BLOCK_BYTES - 1, 128)
    elif how == "header bit":
        flip(path, offset + 40)
    elif how == "label bit":
        flip(path, offset + 70)
    elif how == "zeros":
        overwrite(path, offset, bytes(HEADER_BYTES))
    elif how == "another block":
        overwrite(path, offset, read_place(place_of(directory, key_of(2))))
    elif how == "cut in payload":
        os.truncate(path, offset + HEADER_BYTES + 4096)
    elif how == "empty":
        os.truncate(path, 0)


@pytest.mark.parametrize(
    "how",
    [
        *("payload bit", "last payload bit", "header bit", "label bit", "zeros"),
        *("another block", "cut in payload", "empty"),
    ],
)
def test_a_damaged_block_is_dropped(open_ssd: OpenSsd, directory: Path, how: str) -> None:
    tier, key, other = open_ssd(blocks=16), key_of(1), key_of(2)  # a slab for each
    write(tier, key, other)
    tier.take_changes()
    _damage(directory, key, how)
    assert isinstance(read(tier, key)[0].error, BlockCorrupt)
    assert tier.take_changes() == [Holding(key, TierName.SSD, False)]
    assert tier.stats().io.corrupt_blocks_total == 1
    assert isinstance(read(tier, key)[0].error, BlockMissing)
    assert read(tier, other)[1] == payload_of(other)
    assert write(tier, key)[key].error is None
    assert read(tier, key)[1] == payload_of(key)
    settle(tier, lambda: tier.stats().room.used_bytes == 2 * SLOT_BYTES)


def test_a_dropped_block_is_not_found_by_a_later_start(open_ssd: OpenSsd, directory: Path) -> None:
    tier, key = open_ssd(), key_of(1)
    write(tier, key)
    _damage(directory, key, "payload bit")
    assert isinstance(read(tier, key)[0].error, BlockCorrupt)
    settle(tier, lambda: tier.stats().room.used_bytes == 0)
    assert not list(stored(directory))
    tier.close()
    assert open_ssd().keys() == []


@pytest.mark.parametrize("restart", [False, True])
def test_another_format_version_is_a_counted_miss(
    open_ssd: OpenSsd, directory: Path, restart: bool
) -> None:
    tier, key = open_ssd(), key_of(1)
    write(tier, key)
    path, offset, _ = place_of(directory, key)
    overwrite(path, offset + 8, struct.pack("<I", 9))
    if restart:
        tier.close()
        tier = open_ssd()
    assert isinstance(read(tier, key)[0].error, BlockMissing)
    stats = tier.stats().io
    assert stats.other_version_blocks_total == 1 and stats.corrupt_blocks_total == 0
    settle(tier, lambda: tier.stats().room.used_bytes == 0)


def test_a_block_says_what_it_is(open_ssd: OpenSsd, directory: Path) -> None:
    tier, key = open_ssd(), key_of(1)
    label = BlockLabel(bytes(range(32)), BlockLayout(64, 2, (2500, 2500)))
    tier.submit_writes([BlockIO(key, memoryview(payload_of(key)), label)])
    finish(tier, 1)
    header = decode_header(read_place(place_of(directory, key))[:HEADER_BYTES])
    assert (header.key, header.label, header.payload_bytes) == (key, label, BLOCK_BYTES)
    assert read(tier, key)[0].label == label


def test_the_least_recently_used_block_is_evicted(open_ssd: OpenSsd) -> None:
    tier = open_ssd(blocks=3)
    a, b, c, d = (key_of(i) for i in range(4))
    for key in (a, b, c):
        write(tier, key)
    read(tier, a)
    write(tier, d)
    assert tier.contains([a, b, c, d]) == [True, False, True, True]
    assert Holding(b, TierName.SSD, False) in tier.take_changes()
    assert tier.stats().room.evicted_blocks_total == 1


def test_of_a_prefix_that_was_read_the_end_goes_first(open_ssd: OpenSsd) -> None:
    tier = open_ssd(blocks=4)
    prefix = [key_of(i) for i in range(4)]
    write(tier, *prefix)
    tier.submit_reads([BlockIO(key, memoryview(bytearray(BLOCK_BYTES))) for key in prefix])
    finish(tier, 4)
    write(tier, key_of(5), key_of(6))
    assert tier.contains(prefix) == [True, True, False, False]


def test_files_never_exceed_the_capacity(open_ssd: OpenSsd, directory: Path) -> None:
    tier = open_ssd(blocks=5)
    for start in range(0, 60, 4):
        write(tier, *(key_of(i) for i in range(start, start + 4)))
        assert tier.stats().room.used_bytes <= 5 * SLOT_BYTES
    assert {key for key, _ in stored(directory)} == set(tier.keys())
    sizes = [path.stat().st_blocks * 512 for path in directory.glob("*.slab")]
    tables_bytes = len(sizes) * PAGE_BYTES
    assert sum(sizes) - tables_bytes == tier.stats().room.used_bytes == 5 * SLOT_BYTES


def test_slots_of_another_size_make_way(open_ssd: OpenSsd, directory: Path) -> None:
    """Another model, with larger blocks, takes the room of the first one's."""
    tier = open_ssd(blocks=12)
    old = [key_of(i) for i in range(12)]
    write(tier, *old)
    large = [key_of(i) for i in range(100, 103)]
    for key in large:
        payload = payload_of(key, 3 * BLOCK_BYTES)
        tier.submit_writes([BlockIO(key, memoryview(payload))])
        assert finish(tier, 1)[key].error is None
    assert tier.contains(large) == [True] * 3 and 0 < sum(tier.contains(old)) < 12
    assert tier.stats().room.used_bytes <= 12 * SLOT_BYTES
    for key in large:
        buffer = bytearray(3 * BLOCK_BYTES)
        tier.submit_reads([BlockIO(key, memoryview(buffer))])
        assert finish(tier, 1)[key].error is None
        assert buffer == payload_of(key, 3 * BLOCK_BYTES)
    assert all(read(tier, key)[1] == payload_of(key) for key in old if tier.contains([key])[0])


def test_an_evicted_block_may_return_at_once(open_ssd: OpenSsd) -> None:
    tier, a, b = open_ssd(blocks=1), key_of(1), key_of(2)
    write(tier, a)
    for _ in range(20):
        tier.submit_writes([BlockIO(b, memoryview(payload_of(b)))])
        finish(tier, 1)
        tier.submit_writes([BlockIO(a, memoryview(payload_of(a)))])
        finish(tier, 1)
        assert read(tier, a)[1] == payload_of(a)


def test_more_in_flight_than_the_capacity_is_refused(open_ssd: OpenSsd) -> None:
    tier = open_ssd(blocks=2)
    keys = [key_of(i) for i in range(5)]
    errors = [completion.error for completion in write(tier, *keys).values()]
    assert sum(error is None for error in errors) >= 2
    assert all(error is None or isinstance(error, TierFull) for error in errors)
    assert tier.stats().room.used_bytes <= 2 * SLOT_BYTES


def test_a_block_being_read_is_not_evicted(
    open_ssd: OpenSsd, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, a, b = open_ssd(blocks=1), key_of(1), key_of(2)
    write(tier, a)
    real, gate = os.preadv, threading.Event()

    def gated(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        gate.wait(10)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", gated)
    buffer = bytearray(BLOCK_BYTES)
    tier.submit_reads([BlockIO(a, memoryview(buffer))])
    assert isinstance(write(tier, b)[b].error, TierFull)
    gate.set()
    assert finish(tier, 1)[a].error is None and buffer == payload_of(a)
    assert write(tier, b)[b].error is None


def test_a_damaged_block_may_return_at_once(
    open_ssd: OpenSsd, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, key = open_ssd(blocks=1), key_of(1)
    write(tier, key)
    _damage(directory, key, "payload bit")
    real = os.pwritev

    def slow_erase(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if len(buffers) == 1:
            time.sleep(0.2)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", slow_erase)
    assert isinstance(read(tier, key)[0].error, BlockCorrupt)
    tier.submit_writes([BlockIO(key, memoryview(payload_of(key)))])
    assert finish(tier, 1)[key].error is None
    time.sleep(0.3)
    assert read(tier, key)[1] == payload_of(key)


def test_blocks_are_acknowledged_in_groups_once_synced(
    open_ssd: OpenSsd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No power can be cut here; the order of the calls is what would survive it."""
    tier, gate, calls = open_ssd(blocks=6400), threading.Event(), list[str]()
    real_write, real_sync = os.pwritev, os.fdatasync

    def write_noted(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append("table" if offset < table_bytes_for(400) else "block")
        return real_write(fd, buffers, offset)

    def sync_noted(fd: int) -> None:
        calls.append("sync")
        assert gate.wait(10)
        real_sync(fd)

    monkeypatch.setattr(os, "pwritev", write_noted)
    monkeypatch.setattr(os, "fdatasync", sync_noted)
    keys = [key_of(i) for i in range(20)]
    tier.submit_writes([BlockIO(key, memoryview(payload_of(key))) for key in keys])
    while calls.count("block") < 20:
        time.sleep(0.001)
    assert tier.poll() == [] and tier.take_changes() == [], "volatile"
    gate.set()
    finish(tier, 20)
    assert [change.held for change in tier.take_changes()] == [True] * 20, "durable"
    assert 1 <= calls.count("sync") <= 3
    without_blocks = [call for call in calls if call != "block"]
    assert without_blocks == ["table", "sync"] * calls.count("sync"), "one sync for both"


def test_a_failed_sync_acknowledges_nothing(
    open_ssd: OpenSsd, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, key = open_ssd(), key_of(1)

    def failing(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", failing)
        assert isinstance(write(tier, key)[key].error, OSError)
    assert tier.keys() == [] and tier.stats().room.used_bytes == 0
    assert write(tier, key)[key].error is None


@pytest.mark.parametrize("tables", ["right", "lost"])
def test_a_restart_finds_blocks_and_keeps_the_bounds(
    open_ssd: OpenSsd, directory: Path, tables: str
) -> None:
    tier = open_ssd(blocks=16)
    for i in range(6):
        write(tier, key_of(i))
    tier.close()
    if tables == "lost":
        lose_tables(directory)
    again = open_ssd(blocks=4)
    assert again.contains([key_of(i) for i in range(6)]) == [False, False, True, True, True, True]
    assert again.stats().room.used_bytes == 4 * SLOT_BYTES
    assert again.take_changes() == []
    assert read(again, key_of(5))[1] == payload_of(key_of(5))
    write(again, key_of(7))
    assert again.contains([key_of(2), key_of(3)]) == [False, True], "the oldest goes first"
    again.close()


def test_of_two_slots_with_a_block_the_later_one_counts(open_ssd: OpenSsd, directory: Path) -> None:
    tier, key = open_ssd(blocks=640), key_of(1)
    write(tier, key, key_of(2))
    path, first, slot_bytes = place_of(directory, key)
    _damage(directory, key, "payload bit")
    earlier = read_place(place_of(directory, key))
    assert isinstance(read(tier, key)[0].error, BlockCorrupt)
    write(tier, key)
    tier.close()
    overwrite(path, first + 4 * slot_bytes, earlier)
    lose_tables(directory)
    again = open_ssd(blocks=640)
    assert sorted(again.keys()) == sorted([key, key_of(2)])
    assert again.stats().room.used_bytes == 2 * slot_bytes
    assert read(again, key)[1] == payload_of(key)


def test_a_second_owner_is_told_whom_to_stop(open_ssd: OpenSsd) -> None:
    open_ssd()
    with pytest.raises(DirectoryLocked, match=f"process {os.getpid()}: stop that process"):
        open_ssd()


def test_a_closed_directory_can_be_opened_again(open_ssd: OpenSsd) -> None:
    open_ssd().close()
    open_ssd()


def test_an_unusable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DirectoryUnusable, match="file/ssd: .*choose a directory"):
        SsdTier(tmp_path / "file" / "ssd", SLOT_BYTES, no_wake)
    with pytest.raises(DirectoryUnusable):
        SsdTier("/proc/no-such-place", SLOT_BYTES, no_wake)


@pytest.mark.parametrize("left", ["blocks", "000000-16384.slots"])
def test_an_older_format_is_refused(open_ssd: OpenSsd, directory: Path, left: str) -> None:
    """Also where the file that says so is gone."""
    directory.mkdir()
    (directory / left).mkdir()
    with pytest.raises(DirectoryUnusable, match="older version .* delete it"):
        open_ssd()
    assert (directory / left).exists()


def test_a_newer_format_is_refused(open_ssd: OpenSsd, directory: Path) -> None:
    open_ssd().close()
    (directory / "state").write_text(f'{{"format": {FORMAT + 1}}}')
    with pytest.raises(DirectoryUnusable, match=rf"newer version \(format {FORMAT + 1};"):
        open_ssd()


def test_aligned_memory_is_read_and_written_in_place(
    open_ssd: OpenSsd, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = mmap.mmap(-1, 16384)
    buffer, tier, key, seen = memoryview(memory)[:BLOCK_BYTES], open_ssd(), key_of(1), []
    for name in ("preadv", "pwritev"):
        real = getattr(os, name)

        def noted(fd: int, parts: Any, offset: int, real: Callable[..., int] = real) -> int:
            seen.append([np.frombuffer(part, np.uint8).ctypes.data for part in parts])
            return real(fd, parts, offset)

        monkeypatch.setattr(os, name, noted)
    buffer[:] = payload_of(key)
    tier.submit_writes([BlockIO(key, buffer)])
    finish(tier, 1)
    buffer[:] = bytes(BLOCK_BYTES)
    tier.submit_reads([BlockIO(key, buffer)])
    assert finish(tier, 1)[key].error is None and buffer == payload_of(key)
    address = np.frombuffer(buffer, np.uint8).ctypes.data
    of_blocks = [parts for parts in seen if len(parts) > 1]  # others: pages of the table
    assert [parts[1] for parts in of_blocks] == [address, address]
