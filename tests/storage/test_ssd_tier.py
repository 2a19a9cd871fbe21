"""What only a directory on a disk can do wrong."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import BLOCK_BYTES, finish, key_of, no_wake, payload_of, read, settle, write

from storage.block import BlockKey
from storage.block_format import HEADER_BYTES, object_name
from storage.ssd_tier import DirectoryLocked, DirectoryUnusable, SsdTier
from storage.tier import BlockCorrupt, BlockIO, BlockMissing, HoldingChange, TierFull

STORED_BYTES = HEADER_BYTES + BLOCK_BYTES
OpenSsd = Callable[..., SsdTier]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "ssd"


@pytest.fixture
def open_ssd(directory: Path) -> Iterator[OpenSsd]:
    tiers: list[SsdTier] = []

    def open_with(blocks: int = 100) -> SsdTier:
        tiers.append(SsdTier(directory, blocks * STORED_BYTES, no_wake, threads=4))
        return tiers[-1]

    yield open_with
    for tier in tiers:
        tier.close()


def _damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "payload bit":
        data[HEADER_BYTES + 77] ^= 4
    elif how == "header bit":
        data[40] ^= 1
    elif how == "zeros":
        data[:] = bytes(len(data))
    elif how == "cut in payload":
        del data[-1:]
    elif how == "cut in header":
        del data[100:]
    elif how == "empty":
        data.clear()
    path.write_bytes(data)


@pytest.mark.parametrize(
    "how", ["payload bit", "header bit", "zeros", "cut in payload", "cut in header", "empty"]
)
def test_a_damaged_file_is_dropped(open_ssd: OpenSsd, directory: Path, how: str) -> None:
    tier, key, other = open_ssd(), key_of(1), key_of(2)
    write(tier, key, other)
    tier.take_changes()
    path = directory / object_name(key)
    _damage(path, how)
    assert isinstance(read(tier, key)[0].error, BlockCorrupt)
    assert tier.take_changes() == [HoldingChange(key, False)]
    settle(tier, lambda: not path.exists())
    assert tier.stats().corrupt_blocks_total == 1
    assert isinstance(read(tier, key)[0].error, BlockMissing)
    assert read(tier, other)[1] == payload_of(other)
    write(tier, key)
    assert read(tier, key)[1] == payload_of(key)


def test_a_deleted_file_is_missing(open_ssd: OpenSsd, directory: Path) -> None:
    tier, key = open_ssd(), key_of(1)
    write(tier, key)
    (directory / object_name(key)).unlink()
    assert isinstance(read(tier, key)[0].error, BlockMissing)
    assert tier.contains([key]) == [False] and tier.stats().used_bytes == 0


def test_another_format_version_makes_room(open_ssd: OpenSsd, directory: Path) -> None:
    tier, key = open_ssd(), key_of(1)
    write(tier, key)
    path = directory / object_name(key)
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 8, 9)
    path.write_bytes(data)
    assert isinstance(read(tier, key)[0].error, BlockMissing)
    settle(tier, lambda: not path.exists())
    assert tier.stats().missing_blocks_total == 1 and tier.stats().corrupt_blocks_total == 0


def test_the_least_recently_used_block_is_evicted(open_ssd: OpenSsd) -> None:
    tier = open_ssd(blocks=3)
    a, b, c, d = (key_of(i) for i in range(4))
    write(tier, a)
    write(tier, b)
    write(tier, c)
    read(tier, a)
    write(tier, d)
    assert tier.contains([a, b, c, d]) == [True, False, True, True]
    assert HoldingChange(b, False) in tier.take_changes()
    assert tier.stats().evicted_blocks_total == 1


def test_files_never_exceed_the_capacity(open_ssd: OpenSsd, directory: Path) -> None:
    tier = open_ssd(blocks=5)
    for start in range(0, 60, 4):
        write(tier, *(key_of(i) for i in range(start, start + 4)))
        assert tier.stats().used_bytes <= 5 * STORED_BYTES
    files = [path for path in (directory / "blocks").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {key.hex() for key in tier.keys()}
    assert len(files) == 5 and not list((directory / "tmp").iterdir())


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
    assert tier.stats().used_bytes <= 2 * STORED_BYTES


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
    tier, key = open_ssd(), key_of(1)
    write(tier, key)
    _damage(directory / object_name(key), "payload bit")
    real = Path.unlink

    def slow(path: Path, missing_ok: bool = False) -> None:
        time.sleep(0.2)
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", slow)
    assert isinstance(read(tier, key)[0].error, BlockCorrupt)
    assert write(tier, key)[key].error is None
    time.sleep(0.3)
    assert read(tier, key)[1] == payload_of(key)


def test_a_block_is_acknowledged_only_when_synced(
    open_ssd: OpenSsd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No power can be cut here; the order of the calls is what would survive it."""
    tier, calls = open_ssd(), []
    for name in ("pwritev", "fdatasync", "rename", "fsync"):
        real = getattr(os, name)

        def noted(*arguments: Any, name: str = name, real: Callable[..., Any] = real) -> Any:
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(os, name, noted)
    write(tier, key_of(1))
    assert calls == ["pwritev", "fdatasync", "rename", "fsync"]


def test_a_restart_finds_blocks_and_keeps_the_bounds(open_ssd: OpenSsd, directory: Path) -> None:
    tier = open_ssd()
    for i in range(6):
        write(tier, key_of(i))
        os.utime(directory / object_name(key_of(i)), (1000 + i, 1000 + i))
    tier.close()
    (directory / "tmp" / "left-over").write_bytes(b"half a block")
    again = open_ssd(blocks=4)
    assert again.contains([key_of(i) for i in range(6)]) == [False, False, True, True, True, True]
    assert again.stats().used_bytes == 4 * STORED_BYTES
    assert not list((directory / "tmp").iterdir())
    assert again.take_changes() == []
    assert read(again, key_of(5))[1] == payload_of(key_of(5))
    again.close()


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
        SsdTier(tmp_path / "file" / "ssd", STORED_BYTES, no_wake)
    with pytest.raises(DirectoryUnusable):
        SsdTier("/proc/no-such-place", STORED_BYTES, no_wake)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for about 70 blocks."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a small tmpfs")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_disk_smaller_than_the_capacity_goes_on(small_disk: Path) -> None:
    tier = SsdTier(small_disk, 1 << 40, no_wake, threads=1)
    errors = [write(tier, key_of(i))[key_of(i)].error for i in range(200)]
    refused = [error for error in errors if error is not None]
    assert refused and all(isinstance(error, TierFull) for error in refused)
    assert tier.stats().write_errors_total == len(refused)
    assert sum(error is None for error in errors[100:]) >= 40, "old blocks made way for new"
    held = tier.keys()
    assert len(held) >= 30 and all(read(tier, key)[1] == payload_of(key) for key in held)
    assert not list((small_disk / "tmp").iterdir())
    tier.close()


def test_a_read_only_disk_is_named(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(DirectoryUnusable, match="Read-only"):
        SsdTier(small_disk, STORED_BYTES, no_wake)


def test_a_failed_or_short_call_never_leaves_half_a_block(
    open_ssd: OpenSsd, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patched where no disk can be made to do it on demand."""
    real, calls = os.pwritev, iter(range(1000))

    def short_then_full(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, [buffers[0][:5000]], offset)

    monkeypatch.setattr(os, "pwritev", short_then_full)
    tier = open_ssd()
    assert write(tier, key_of(1))[key_of(1)].error is None
    assert isinstance(write(tier, key_of(2))[key_of(2)].error, TierFull)
    assert isinstance(read(tier, key_of(2))[0].error, BlockMissing)
    assert not list((directory / "tmp").iterdir())


_WRITER = """
import sys
sys.path[:0] = sys.argv[3:]
from conftest import key_of, payload_of, no_wake
from storage.ssd_tier import SsdTier
from storage.tier import BlockIO
tier = SsdTier(sys.argv[1], 1 << 30, no_wake, threads=4)
number, waiting = int(sys.argv[2]), {}
while True:
    while len(waiting) < 16:
        waiting[key_of(number)] = number
        tier.submit_writes([BlockIO(key_of(number), memoryview(payload_of(key_of(number))))])
        number += 1
    for completion in tier.poll():
        assert completion.error is None, completion
        print(waiting.pop(completion.key), flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(directory: Path) -> None:
    acknowledged: set[BlockKey] = set()
    places = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    for round_number in range(4):
        arguments = [str(directory), str(round_number * 100_000), *places]
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, *arguments], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        for _ in range(20 + 37 * round_number):
            acknowledged.add(key_of(int(writer.stdout.readline())))
        writer.kill()
        # a line that the kill cut is no acknowledgement
        lines = [
            line for line in writer.stdout.read().splitlines(keepends=True) if line[-1:] == b"\n"
        ]
        acknowledged |= {key_of(int(line)) for line in lines}
        writer.wait()
    tier = SsdTier(directory, 1 << 30, no_wake)
    assert len(acknowledged) > 200
    assert all(tier.contains(list(acknowledged)))
    for key in tier.keys():
        completion, data = read(tier, key)
        assert completion.error is None and data == payload_of(key)
    tier.close()
