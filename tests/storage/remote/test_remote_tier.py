"""What only a shared, slow or absent remote store can do wrong."""

from __future__ import annotations

import socket
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from common.block import BlockLabel, BlockLayout, TierName
from common.messages.from_agents import Holding
from storage.block_format import HEADER_BYTES
from storage.index.owners import Selector
from storage.remote.tier import RemoteTier, RemoteUnusable
from storage.tiers.contract import BlockCorrupt, BlockIO, BlockMissing
from tests.storage.conftest import (
    BLOCK_BYTES,
    QUICK,
    finish,
    key_of,
    no_wake,
    payload_of,
    read,
    settle,
    write,
)
from tests.storage.remote.conftest import Open
from tests.storage.remote.pack_files import flip, pack_stats, packs_in, places_in

STALE_S = 0.4


class HangingFileSystem(MemoryFileSystem):
    """``hanging://``: reads and writes of packs wait while the gate is closed."""

    protocol = "hanging"
    gate = threading.Event()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("hanging://", "memory://"))

    def cat_file(self, path: str, **kwargs: Any) -> bytes:
        if "/packs/" in path:
            self.gate.wait(20)
        return bytes(super().cat_file(path, **kwargs))

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "/packs/" in path and mode == "wb":
            self.gate.wait(20)
        return super().open(path, mode, **kwargs)


fsspec.register_implementation("hanging", HangingFileSystem, clobber=True)


@pytest.fixture
def open_remote(open_remote: Open) -> Iterator[Open]:
    """What hangs goes on before the tiers are closed."""
    yield open_remote
    HangingFileSystem.gate.set()


def test_what_another_agent_uploads_is_found(open_remote: Open, url: str) -> None:
    ours, theirs = open_remote(url), open_remote(url)
    settle(ours, lambda: True)
    write(theirs, key_of(1))
    assert ours.contains([key_of(1)]) == [False]
    completion, data = read(ours, key_of(1))
    assert completion.error is None and data == payload_of(key_of(1))
    assert ours.take_changes() == [Holding(key_of(1), TierName.REMOTE, True)]


def test_a_start_announces_earlier_blocks_up_to_a_bound(open_remote: Open, url: str) -> None:
    first = open_remote(url)
    for i in range(0, 30, 5):
        write(first, *(key_of(j) for j in range(i, i + 5)))
    keys = [key_of(i) for i in range(30)]
    again = open_remote(url)
    settle(again, lambda: all(again.contains(keys)))
    assert {change.key for change in again.take_changes()} == set(keys)
    bounded = open_remote(url, index_blocks_max=12)
    settle(bounded, lambda: bounded.has_looked)  # packs come in any order
    assert sorted(bounded.keys()) == sorted(keys[-10:]), "the latest packs, whole"
    assert read(again, keys[0])[1] == payload_of(keys[0])


def test_blocks_written_together_share_a_pack(open_remote: Open, url: str, tmp_path: Path) -> None:
    tier = open_remote(url, linger_s=0.2)
    write(tier, *(key_of(i) for i in range(20)))
    assert len(packs_in(tmp_path / "remote")) == 1
    assert pack_stats(tier).packs == 1
    small = open_remote(url, pack_bytes=5 * BLOCK_BYTES, linger_s=5.0)
    write(small, *(key_of(i) for i in range(100, 120)))
    assert len(packs_in(tmp_path / "remote")) == 5, "a full pack does not wait"


def test_namespaces_have_packs_of_their_own(open_remote: Open, url: str, tmp_path: Path) -> None:
    tier = open_remote(url, linger_s=0.2)
    labels = [BlockLabel(bytes([n]) * 32, BlockLayout(64, 2, (8,)), tenant="t") for n in (1, 2)]
    blocks = [
        BlockIO(key_of(i), memoryview(payload_of(key_of(i))), labels[i % 2]) for i in range(6)
    ]
    tier.submit_writes(blocks)
    assert all(c.error is None for c in finish(tier, 6).values())
    folders = {path.parent.name for path in packs_in(tmp_path / "remote")}
    assert folders == {label.namespace_digest.hex() for label in labels}
    assert read(tier, key_of(3))[0].label == labels[1]
    again = open_remote(url)
    settle(again, lambda: len(again.keys()) == 6)
    assert {owner for owner, *_ in again.owners.usage()} == {label.owner for label in labels}


@pytest.mark.parametrize("at", [4, 50, HEADER_BYTES, -1])
def test_a_damaged_block_is_a_miss_until_it_is_written_anew(
    open_remote: Open, url: str, tmp_path: Path, at: int
) -> None:
    tier, key, neighbour = open_remote(url), key_of(1), key_of(2)
    write(tier, key, neighbour)
    tier.take_changes()
    flip(places_in(tmp_path / "remote")[key][0], at)
    assert isinstance(read(tier, key)[0].error, BlockCorrupt)
    assert tier.take_changes() == [Holding(key, TierName.REMOTE, False)]
    assert tier.stats().io.corrupt_blocks_total == 1
    assert isinstance(read(tier, key)[0].error, BlockMissing)
    assert read(tier, neighbour)[1] == payload_of(neighbour)
    write(tier, key)
    assert read(tier, key)[1] == payload_of(key)
    again = open_remote(url)
    settle(again, lambda: pack_stats(again).packs == 2)
    assert read(again, key)[1] == payload_of(key), "the later pack counts for others too"


def test_a_newer_block_format_is_missing_and_left_alone(
    open_remote: Open, url: str, tmp_path: Path
) -> None:
    tier, key = open_remote(url), key_of(1)
    write(tier, key)
    place = places_in(tmp_path / "remote")[key][0]
    data = bytearray(place.path.read_bytes())
    struct.pack_into("<I", data, place.offset + 8, 99)
    place.path.write_bytes(data)
    assert isinstance(read(tier, key)[0].error, BlockMissing)
    assert place.path.read_bytes() == data
    assert tier.stats().io.other_version_blocks_total == 1


def test_a_newer_pack_format_is_left_alone(open_remote: Open, url: str, tmp_path: Path) -> None:
    write(open_remote(url), key_of(1))
    (path,) = packs_in(tmp_path / "remote")
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, len(data) - 48 + 8, 99)
    path.write_bytes(data)
    tier = open_remote(url)
    assert isinstance(read(tier, key_of(1))[0].error, BlockMissing)
    assert pack_stats(tier).unreadable_packs_total == 1 and path.read_bytes() == data


def test_folders_show_only_whole_packs(open_remote: Open, url: str, tmp_path: Path) -> None:
    write(open_remote(url), *(key_of(i) for i in range(20)))
    files = [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    assert {path.suffix for path in files if "packs" in str(path)} == {".pack"}
    assert {path.name for path in files if "packs" not in str(path)} == {"format"}


def test_a_pack_that_others_rewrote_is_found_again(
    open_remote: Open, url: str, tmp_path: Path
) -> None:
    tier, key = open_remote(url), key_of(1)
    write(tier, key, key_of(2))
    (old,) = packs_in(tmp_path / "remote")
    theirs = open_remote(f"file://{tmp_path}/other")
    write(theirs, key)
    (new,) = packs_in(tmp_path / "other")
    new.rename(old.parent / new.name)
    old.unlink()
    assert read(tier, key)[1] == payload_of(key)
    assert isinstance(read(tier, key_of(2))[0].error, BlockMissing)


def test_a_drop_is_seen_by_those_who_share_the_store(open_remote: Open, url: str) -> None:
    label = BlockLabel(bytes(32), BlockLayout(64, 2, (8,)), weight_version="step-1")
    ours, theirs = open_remote(url), open_remote(url, refresh_s=0.05)
    key, kept = key_of(1), key_of(2)
    ours.submit_writes([BlockIO(key, memoryview(payload_of(key)), label)])
    finish(ours, 1)
    write(ours, kept)
    settle(theirs, lambda: theirs.contains([key, kept]) == [True, True])
    ours.drop(Selector.parse("version:step-1"))
    assert ours.contains([key, kept]) == [False, True]
    settle(theirs, lambda: theirs.contains([key, kept]) == [False, True])
    assert theirs.take_drops() == [Selector.parse("version:step-1")]
    again = open_remote(url)
    settle(again, lambda: again.contains([kept]) == [True])
    assert again.contains([key]) == [False]
    assert isinstance(read(again, key)[0].error, BlockMissing)
    again.submit_writes([BlockIO(key, memoryview(payload_of(key)), label)])
    assert finish(again, 1)[key].error is None and again.contains([key]) == [True]


def test_a_late_read_never_touches_the_buffer(open_remote: Open) -> None:
    HangingFileSystem.gate.set()
    tier, key = open_remote(f"hanging://{uuid.uuid4().hex}", timeout_s=STALE_S), key_of(1)
    write(tier, key)
    HangingFileSystem.gate.clear()
    buffers = [bytearray(BLOCK_BYTES) for _ in range(6)]
    start = time.monotonic()
    for buffer in buffers:
        tier.submit_reads([BlockIO(key, memoryview(buffer))])
    completions = []
    while len(completions) < 6 and time.monotonic() - start < 5:
        completions += tier.poll()
        time.sleep(0.01)
    assert time.monotonic() - start < 2, "those that never began expire as well"
    assert [type(completion.error) for completion in completions] == [TimeoutError] * 6
    HangingFileSystem.gate.set()
    time.sleep(0.2)
    assert all(not any(buffer) for buffer in buffers)
    assert tier.poll() == [] and tier.stats().io.read_queue_bytes == 0
    assert read(tier, key)[1] == payload_of(key), "the threads came back"


def test_a_late_write_uploads_only_right_bytes(open_remote: Open) -> None:
    HangingFileSystem.gate.clear()
    tier = open_remote(f"hanging://{uuid.uuid4().hex}", timeout_s=STALE_S)
    buffers = {key_of(i): bytearray(payload_of(key_of(i))) for i in range(1, 5)}
    for key, buffer in buffers.items():
        tier.submit_writes([BlockIO(key, memoryview(buffer))])
        time.sleep(0.05)  # a pack each
    for completion in finish(tier, 4).values():
        assert isinstance(completion.error, TimeoutError)
    for buffer in buffers.values():
        buffer[:] = bytes(BLOCK_BYTES)
    HangingFileSystem.gate.set()
    time.sleep(0.2)
    for key in buffers:
        completion, data = read(tier, key)
        assert isinstance(completion.error, BlockMissing) or data == payload_of(key)
    assert tier.stats().io.corrupt_blocks_total == 0


def test_the_owner_is_woken_for_a_deadline() -> None:
    HangingFileSystem.gate.set()
    woken = threading.Event()
    settings = msgspec.structs.replace(QUICK, threads=1, timeout_s=0.2)
    tier = RemoteTier(f"hanging://{uuid.uuid4().hex}", {}, woken.set, settings)
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


def test_the_layout_before_packs_is_refused(url: str, tmp_path: Path) -> None:
    old = tmp_path / "remote" / "blocks" / "00" / ("0" * 64)
    old.parent.mkdir(parents=True)
    old.write_bytes(b"anything")
    for _ in range(2):
        with pytest.raises(RemoteUnusable, match="earlier version"):
            RemoteTier(url, {}, no_wake)
    assert old.read_bytes() == b"anything"


def test_another_format_of_packs_is_refused(url: str, tmp_path: Path) -> None:
    RemoteTier(url, {}, no_wake, QUICK).close()
    (tmp_path / "remote" / "format").write_text("dualpath packs 2\n")
    with pytest.raises(RemoteUnusable, match="packs 2"):
        RemoteTier(url, {}, no_wake)


def test_bad_options_are_refused_with_the_reason() -> None:
    with pytest.raises(RemoteUnusable, match="no_such_option"):
        settings = msgspec.structs.replace(QUICK, timeout_s=5)
        RemoteTier("s3://bucket", {"no_such_option": 1}, no_wake, settings)


def test_a_silent_server_is_refused_in_time() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        options = {"key": "k", "secret": "s"}
        options["endpoint_url"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(RemoteUnusable):
            settings = msgspec.structs.replace(QUICK, timeout_s=1)
            RemoteTier("s3://bucket", options, no_wake, settings)
        assert time.monotonic() - start < 5
