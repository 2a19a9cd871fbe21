"""Several disks, and disks that are full, read-only, failing or odd."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from storage.ssd import backend as ssd_backend
from storage.ssd.device import ERRORS_MAX
from storage.ssd.slab import slot_bytes_for
from storage.ssd.slab_table import table_bytes_for
from storage.ssd.tier import DirectoryLocked, DirectoryUnusable, DiskBroken, SsdTier
from storage.tiers.contract import BlockIO, DeviceStats, TierFull
from tests.storage.conftest import finish, key_of, no_wake, payload_of, read, settle, write
from tests.storage.ssd.slab_files import lose_tables, slow_down, stored

SLOT_BYTES = slot_bytes_for(len(payload_of(key_of(0))))


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [tmp_path / f"disk{i}" for i in range(3)]


@pytest.fixture
def open_ssd(folders: list[Path], closing: Callable[[SsdTier], SsdTier]) -> Callable[..., SsdTier]:
    def open_with(blocks: int = 300) -> SsdTier:
        return closing(SsdTier(folders, blocks * SLOT_BYTES, no_wake, threads=2))

    return open_with


def devices_of(tier: SsdTier) -> DeviceStats:
    devices = tier.stats().devices
    assert devices is not None
    return devices


def _fail(monkeypatch: pytest.MonkeyPatch, names: Sequence[str], folder: Path, number: int) -> None:
    """Let these functions of ``os`` fail on files of the folder."""
    for name in names:
        real = getattr(os, name)

        def failing(fd: int, *arguments: object, real: Callable[..., int] = real) -> int:
            if os.readlink(f"/proc/self/fd/{fd}").startswith(str(folder)):
                raise OSError(number, os.strerror(number))
            return real(fd, *arguments)

        monkeypatch.setattr(os, name, failing)


def test_blocks_are_striped_and_found_again(
    open_ssd: Callable[..., SsdTier], folders: list[Path]
) -> None:
    tier = open_ssd()
    keys = [key_of(i) for i in range(30)]
    write(tier, *keys)
    assert [len(list(stored(folder))) for folder in folders] == [10, 10, 10]
    assert devices_of(tier).devices == 3
    tier.close()
    again = open_ssd()
    assert sorted(again.keys()) == sorted(keys)
    assert all(read(again, key)[1] == payload_of(key) for key in keys)


def test_the_capacity_is_that_of_all_disks(open_ssd: Callable[..., SsdTier]) -> None:
    tier = open_ssd(blocks=12)
    keys = [key_of(i) for i in range(40)]
    for key in keys:
        write(tier, key)
    assert sorted(tier.keys()) == sorted(keys[-12:])
    assert tier.stats().room.used_bytes == tier.stats().room.capacity_bytes == 12 * SLOT_BYTES


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
def test_a_disk_that_fails_is_taken_out(
    open_ssd: Callable[..., SsdTier],
    folders: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    tier = open_ssd()
    keys = [key_of(i) for i in range(60)]
    write(tier, *keys)
    on_failing = {key for key, _ in stored(folders[1])}
    tier.take_changes()
    _fail(monkeypatch, ["preadv", "pwritev", "fdatasync"], folders[1], number)
    buffers = {key: bytearray(payload_of(key)) for key in keys}
    tier.submit_reads([BlockIO(key, memoryview(buffers[key])) for key in keys])
    completions = finish(tier, len(keys))
    assert {key for key in keys if completions[key].error is not None} == on_failing
    assert devices_of(tier) == DeviceStats(devices=2, failed_devices=1)
    assert tier.stats().room.capacity_bytes == 200 * SLOT_BYTES
    # The first blocks that could not be read are being removed while the disk is taken out.
    settle(tier, lambda: tier.stats().room.used_bytes == 40 * SLOT_BYTES)
    assert {change.key for change in tier.take_changes() if not change.held} == on_failing
    assert [r.levelno for r in caplog.records if "taken out" in r.message] == [logging.ERROR]
    new = [key_of(i) for i in range(100, 130)]
    assert all(completion.error is None for completion in write(tier, *new).values())
    assert all(read(tier, key)[1] == payload_of(key) for key in tier.keys())


def test_errors_now_and_then_do_not_take_a_disk_out(
    open_ssd: Callable[..., SsdTier], folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_ssd()
    keys = [key_of(i) for i in range(90)]
    write(tier, *keys)
    on_first = [key for key, _ in stored(folders[0])]
    assert len(on_first) > 2 * ERRORS_MAX
    for bad, good in zip(on_first[::2], on_first[1::2], strict=False):
        with monkeypatch.context() as patched:
            _fail(patched, ["preadv"], folders[0], errno.EIO)
            assert read(tier, bad)[0].error is not None
        assert read(tier, good)[0].error is None
    assert devices_of(tier).failed_devices == 0


def test_a_slow_disk_delays_its_own_blocks_alone(
    open_ssd: Callable[..., SsdTier], folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it has more of them than threads, and for writes as for reads."""
    tier = open_ssd()
    keys, new = [key_of(i) for i in range(60)], [key_of(i) for i in range(100, 160)]
    write(tier, *keys)
    slow = {key for key, _ in stored(folders[1])}
    gate = slow_down(monkeypatch, folders[1])
    buffers = {key: bytearray(payload_of(key)) for key in keys + new}
    blocks = [BlockIO(key, memoryview(buffer)) for key, buffer in buffers.items()]
    tier.submit_reads(blocks[:60])
    tier.submit_writes(blocks[60:])
    quick = finish(tier, 80)
    assert all(completion.error is None for completion in quick.values())
    assert not slow & quick.keys()
    gate.set()
    late = finish(tier, 40)
    assert all(completion.error is None for completion in late.values()) and slow < late.keys()
    assert devices_of(tier).failed_devices == 0
    assert all(buffer == payload_of(key) for key, buffer in buffers.items())


def test_the_tier_starts_without_a_dead_disk(
    open_ssd: Callable[..., SsdTier], folders: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    folders[1].write_text("not a folder")
    tier = open_ssd()
    assert devices_of(tier).devices == 2 and devices_of(tier).failed_devices == 1
    assert "goes on without" in caplog.text and str(folders[1]) in caplog.text
    assert write(tier, key_of(1))[key_of(1)].error is None


def test_headers_that_cannot_be_read_lose_those_blocks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ssd"
    tier = SsdTier(folder, 1000 * SLOT_BYTES, no_wake)
    write(tier, *(key_of(i) for i in range(10)))
    tier.close()
    lose_tables(folder)
    real = os.preadv

    def bad_sector(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        bad = table_bytes_for(62) + 3 * SLOT_BYTES
        if offset <= bad < offset + sum(buffer.nbytes for buffer in buffers):
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", bad_sector)
    tier = SsdTier(folder, 1000 * SLOT_BYTES, no_wake)
    assert len(tier.keys()) == 9 and devices_of(tier).devices == 1
    tier.close()


def test_without_any_disk_it_does_not_start(
    open_ssd: Callable[..., SsdTier], folders: list[Path]
) -> None:
    for folder in folders:
        folder.write_text("not a folder")
    with pytest.raises(DirectoryUnusable):
        open_ssd()


def test_a_folder_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DirectoryLocked):
        SsdTier([tmp_path / "a", tmp_path / "a"], 100 * SLOT_BYTES, no_wake)
    SsdTier(tmp_path / "a", 100 * SLOT_BYTES, no_wake).close()


def test_a_file_system_without_direct_io_is_used_all_the_same(
    open_ssd: Callable[..., SsdTier],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = os.open

    def refusing(path: str, flags: int, *arguments: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *arguments)

    monkeypatch.setattr(os, "open", refusing)
    tier = open_ssd()
    write(tier, key_of(1))
    assert read(tier, key_of(1))[1] == payload_of(key_of(1))
    assert len([r for r in caplog.records if "has no O_DIRECT" in r.message]) == 3, "one a disk"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for about 50 blocks."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a small tmpfs")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_disk_smaller_than_the_capacity_goes_on(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = SsdTier(small_disk, 1 << 40, no_wake, threads=1)
    assert tier.stats().room.capacity_bytes <= 1 << 20 and "has room for" in caplog.text
    (small_disk / "of somebody else").write_bytes(bytes(200_000))
    for i in range(200):
        assert write(tier, key_of(i))[key_of(i)].error is None, "old blocks make way for new"
    held = tier.keys()
    assert len(held) >= 30 and all(read(tier, key)[1] == payload_of(key) for key in held)
    assert tier.stats().room.used_bytes == len(held) * SLOT_BYTES
    tier.close()


def test_a_disk_that_another_fills_at_the_same_time_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk has no room for a slab, though it had when the slab was planned."""
    real, calls = os.posix_fallocate, iter(range(1000))

    def refusing(fd: int, offset: int, nbytes: int) -> None:
        if next(calls) >= 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", refusing)
    tier = SsdTier(tmp_path / "ssd", 16 * SLOT_BYTES, no_wake, threads=1)
    errors = [write(tier, key_of(i))[key_of(i)].error for i in range(50)]
    assert [i for i, error in enumerate(errors) if error is not None] == [10]
    assert isinstance(errors[10], TierFull) and "is full" in caplog.text
    stats = tier.stats().room
    assert stats.used_bytes == stats.capacity_bytes == 10 * SLOT_BYTES
    assert devices_of(tier).devices == 1 and tier.stats().io.write_errors_total == 1
    assert all(read(tier, key)[1] == payload_of(key) for key in tier.keys())
    tier.close()
    assert len(list((tmp_path / "ssd").glob("*.slab"))) == 10


def test_a_shared_disk_keeps_its_minimum_free(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssd_backend, "FOLDER_CHECK_S", 0.0)
    min_free_bytes = 300_000
    tier = SsdTier(small_disk, 1 << 40, no_wake, min_free_bytes=min_free_bytes)
    for i in range(100):
        assert write(tier, key_of(i))[key_of(i)].error is None
    assert _free_bytes(small_disk) >= min_free_bytes
    before = tier.stats().room
    (small_disk / "of somebody else").write_bytes(bytes(200_000))
    settle(tier, lambda: _free_bytes(small_disk) >= min_free_bytes)
    after = tier.stats().room
    assert 0 < after.used_bytes <= after.capacity_bytes < before.capacity_bytes - 150_000
    assert tier.contains([key_of(99)]) == [True], "the least recently used ones went"
    assert all(read(tier, key)[1] == payload_of(key) for key in tier.keys())
    (small_disk / "of somebody else").unlink()
    for i in range(100, 200):
        write(tier, key_of(i))
    assert tier.stats().room.used_bytes == before.used_bytes, "it grows again"
    tier.close()


def test_a_disk_that_tells_and_removes_nothing_does_not_stop_the_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier = SsdTier(tmp_path / "ssd", 12 * SLOT_BYTES, no_wake)
    write(tier, *(key_of(i) for i in range(12)))

    def failing(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(os, "statvfs", failing)
        patched.setattr(Path, "unlink", failing)
        large = BlockIO(key_of(100), memoryview(bytes(3 * SLOT_BYTES)))
        tier.submit_writes([large])
        finish(tier, 1)
        assert devices_of(tier).devices == 1 and "a slab stays" in caplog.text
    assert all(read(tier, key)[1] == payload_of(key) for key in tier.keys() if key != large.key)
    tier.close()


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def test_a_read_only_disk_is_named(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(DiskBroken, match="Read-only"):
        SsdTier(small_disk, SLOT_BYTES, no_wake)


def test_failed_and_short_calls_never_leave_half_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.pwritev, iter(range(1000))

    def short_then_full(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if next(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, [buffers[0][:4096]], offset)

    tier = SsdTier(tmp_path / "ssd", 100 * SLOT_BYTES, no_wake, threads=1)
    monkeypatch.setattr(os, "pwritev", short_then_full)
    results = [write(tier, key_of(i))[key_of(i)].error for i in range(3)]
    assert sum(isinstance(error, TierFull) for error in results) == 1
    monkeypatch.undo()
    for i, error in enumerate(results):
        completion, data = read(tier, key_of(i))
        assert (completion.error is None) == (error is None)
        assert error is not None or data == payload_of(key_of(i))
    tier.close()
    assert len(list(stored(tmp_path / "ssd"))) >= 2
