"""What only a shared, slow or absent remote store can do wrong."""

from __future__ import annotations

import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import BLOCK_BYTES, finish, key_of, no_wake, payload_of, read, settle, write
from fsspec.implementations.memory import MemoryFileSystem

from benchmarks.radosgw import RadosGateway
from storage.block_format import HEADER_BYTES, object_name
from storage.remote_tier import RemoteTier, RemoteUnusable
from storage.tier import BlockCorrupt, BlockIO, BlockMissing, HoldingChange


class HangingFileSystem(MemoryFileSystem):
    """``hanging://``: reads and writes of blocks wait while the gate is closed."""

    protocol = "hanging"
    gate = threading.Event()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("hanging://", "memory://"))

    def cat_file(self, path: str, **kwargs: Any) -> bytes:
        self.gate.wait(20)
        return bytes(super().cat_file(path, **kwargs))

    def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        if "/blocks/" in path:
            self.gate.wait(20)
        super().pipe_file(path, value, **kwargs)


fsspec.register_implementation("hanging", HangingFileSystem, clobber=True)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/remote"


@pytest.fixture
def open_remote() -> Iterator[Callable[..., RemoteTier]]:
    tiers: list[RemoteTier] = []

    def open_with(url: str, **arguments: Any) -> RemoteTier:
        tiers.append(RemoteTier(url, {}, no_wake, threads=2, **arguments))
        return tiers[-1]

    yield open_with
    HangingFileSystem.gate.set()
    for tier in tiers:
        tier.close()


Open = Callable[..., RemoteTier]


def test_what_another_agent_uploads_is_found(open_remote: Open, url: str) -> None:
    ours, theirs = open_remote(url), open_remote(url)
    settle(ours, lambda: True)
    write(theirs, key_of(1))
    assert ours.contains([key_of(1)]) == [False]
    completion, data = read(ours, key_of(1))
    assert completion.error is None and data == payload_of(key_of(1))
    assert ours.take_changes() == [HoldingChange(key_of(1), True)]


def test_the_listing_announces_earlier_blocks_up_to_its_bound(open_remote: Open, url: str) -> None:
    keys = [key_of(i) for i in range(30)]
    write(open_remote(url), *keys)
    again = open_remote(url)
    settle(again, lambda: all(again.contains(keys)))
    assert {change.key for change in again.take_changes()} == set(keys)
    bounded = open_remote(url, index_blocks_max=10)
    settle(bounded, lambda: len(bounded.keys()) == 10)
    assert read(bounded, keys[0])[1] == payload_of(keys[0]), "not in the index, yet tried"
    assert len(bounded.keys()) <= 10


@pytest.mark.parametrize("size_bytes", [0, 100, HEADER_BYTES, HEADER_BYTES + 500, None])
def test_damaged_objects_are_deleted(
    open_remote: Open, url: str, tmp_path: Path, size_bytes: int | None
) -> None:
    tier, key = open_remote(url), key_of(1)
    write(tier, key)
    tier.take_changes()
    path = tmp_path / "remote" / object_name(key)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data[:size_bytes])
    assert isinstance(read(tier, key)[0].error, BlockCorrupt)
    settle(tier, lambda: not path.exists())
    assert tier.take_changes() == [HoldingChange(key, False)]
    assert tier.stats().corrupt_blocks_total == 1
    assert isinstance(read(tier, key)[0].error, BlockMissing)
    write(tier, key)
    assert read(tier, key)[1] == payload_of(key)


def test_a_newer_format_is_left_to_newer_programs(
    open_remote: Open, url: str, tmp_path: Path
) -> None:
    tier, key = open_remote(url), key_of(1)
    write(tier, key)
    path = tmp_path / "remote" / object_name(key)
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 8, 9)
    path.write_bytes(data)
    assert isinstance(read(tier, key)[0].error, BlockMissing)
    assert isinstance(read(tier, key)[0].error, BlockMissing)
    assert path.read_bytes() == data
    assert tier.stats().other_version_blocks_total == 2


def test_folders_show_only_whole_blocks(open_remote: Open, url: str, tmp_path: Path) -> None:
    tier = open_remote(url)
    write(tier, *(key_of(i) for i in range(20)))
    files = [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {key_of(i).hex() for i in range(20)}
    assert {path.stat().st_size for path in files} == {HEADER_BYTES + BLOCK_BYTES}


def test_a_late_read_never_touches_the_buffer(open_remote: Open) -> None:
    HangingFileSystem.gate.set()
    tier, key = open_remote(f"hanging://{uuid.uuid4().hex}", timeout_s=0.4), key_of(1)
    write(tier, key)
    HangingFileSystem.gate.clear()
    buffers = [bytearray(BLOCK_BYTES) for _ in range(6)]
    start = time.monotonic()
    tier.submit_reads([BlockIO(key, memoryview(buffer)) for buffer in buffers])
    completions = []
    while len(completions) < 6 and time.monotonic() - start < 5:
        completions += tier.poll()
        time.sleep(0.01)
    assert time.monotonic() - start < 2, "those that never began expire as well"
    assert [type(completion.error) for completion in completions] == [TimeoutError] * 6
    HangingFileSystem.gate.set()
    time.sleep(0.2)
    assert all(not any(buffer) for buffer in buffers)
    assert tier.poll() == [] and tier.stats().read_queue_bytes == 0
    assert read(tier, key)[1] == payload_of(key), "the threads came back"


def test_a_late_write_uploads_only_right_bytes(open_remote: Open) -> None:
    HangingFileSystem.gate.clear()
    tier, key, other = (
        open_remote(f"hanging://{uuid.uuid4().hex}", timeout_s=0.4),
        key_of(1),
        key_of(2),
    )
    buffers = {k: bytearray(payload_of(k)) for k in (key, other, key_of(3), key_of(4))}
    tier.submit_writes([BlockIO(k, memoryview(buffer)) for k, buffer in buffers.items()])
    for completion in finish(tier, 4).values():
        assert isinstance(completion.error, TimeoutError)
    for buffer in buffers.values():
        buffer[:] = bytes(BLOCK_BYTES)
    HangingFileSystem.gate.set()
    time.sleep(0.2)
    for k in buffers:
        completion, data = read(tier, k)
        assert isinstance(completion.error, BlockMissing) or data == payload_of(k)
    assert tier.stats().corrupt_blocks_total == 0


def test_the_owner_is_woken_for_a_deadline() -> None:
    HangingFileSystem.gate.set()
    woken = threading.Event()
    tier = RemoteTier(f"hanging://{uuid.uuid4().hex}", {}, woken.set, threads=1, timeout_s=0.2)
    write(tier, key_of(1))
    HangingFileSystem.gate.clear()
    tier.submit_reads([BlockIO(key_of(1), memoryview(bytearray(BLOCK_BYTES)))])
    end = time.monotonic() + 3
    completions = []
    while not completions and time.monotonic() < end:
        woken.clear()
        completions = tier.poll()
        assert completions or woken.wait(1)
    assert isinstance(completions[0].error, TimeoutError)
    HangingFileSystem.gate.set()
    tier.close()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nosuch://bucket/x", "Protocol not known"),
        ("/just/a/path", "write file:///path/to/folder"),
        ("file:///proc/no-such-place", "No such file"),
        ("gs://bucket", "gcsfs"),
    ],
)
def test_a_bad_url_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(RemoteUnusable, match=reason) as refusal:
        RemoteTier(url, {}, no_wake)
    assert refusal.value.url == url


def test_bad_options_are_refused_with_the_reason() -> None:
    with pytest.raises(RemoteUnusable, match="no_such_option"):
        RemoteTier("s3://bucket", {"no_such_option": 1}, no_wake, timeout_s=5)


def test_a_silent_server_is_refused_in_time() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        options = {"key": "k", "secret": "s"}
        options["endpoint_url"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(RemoteUnusable, match="no answer within 1 s"):
            RemoteTier("s3://bucket", options, no_wake, timeout_s=1)
        assert time.monotonic() - start < 5


@pytest.mark.slow
def test_s3_refuses_an_unknown_bucket_and_wrong_credentials(radosgw: RadosGateway) -> None:
    with pytest.raises(RemoteUnusable, match="bucket"):
        RemoteTier("s3://no-such-bucket/x", radosgw.options, no_wake)
    wrong = {**radosgw.options, "secret": "wrong"}
    with pytest.raises(RemoteUnusable):
        RemoteTier(f"s3://{radosgw.bucket}/x", wrong, no_wake)


@pytest.mark.slow
def test_s3_damage_is_found_and_deleted(radosgw: RadosGateway) -> None:
    url = f"s3://{radosgw.bucket}/{uuid.uuid4().hex}"
    tier, key = RemoteTier(url, radosgw.options, no_wake, threads=2), key_of(1)
    write(tier, key)
    filesystem = fsspec.filesystem("s3", use_listings_cache=False, **radosgw.options)
    path = f"{url}/{object_name(key)}"
    stored = filesystem.cat_file(path)
    filesystem.pipe_file(path, stored[:-1] + bytes([stored[-1] ^ 1]))
    assert isinstance(read(tier, key)[0].error, BlockCorrupt)
    settle(tier, lambda: not filesystem.exists(path))
    assert isinstance(read(tier, key)[0].error, BlockMissing)
    tier.close()
