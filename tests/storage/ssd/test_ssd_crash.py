"""What was acknowledged survives, and nothing wrong is ever delivered: kill -9, power cuts
replayed from a record of the writes, random damage."""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from common.block import BlockKey
from storage.block_format import HEADER_BYTES, decode_header
from storage.ssd import slab_space
from storage.ssd.slab import slot_bytes_for
from storage.ssd.slab_table import ENTRY_BYTES
from storage.ssd.tier import DirectoryUnusable, SsdTier
from storage.tiers.contract import BlockCorrupt, BlockIO, BlockMissing
from tests.examples import PART
from tests.storage.conftest import key_of, no_wake, payload_of, read, write
from tests.storage.ssd.slab_files import flip, lose_tables, overwrite, table_bytes_of

SLOT_BYTES = slot_bytes_for(len(payload_of(key_of(0))))
SECTOR_BYTES = 512
"""What a disk writes as a whole; of more than that a part may arrive."""

ACKNOWLEDGED_MIN = 3
"""Before a kill, however slowly a writer gets on here."""
KILLS = round(100 * PART)
KILL_FOLDERS = 4
"""Each is filled, killed and opened again by a line of processes of its own."""


def _write_until_killed(folder: Path, first: int, acknowledgements: int) -> None:
    """In a child process: write blocks for ever, and say which are acknowledged."""
    tier = SsdTier(folder, 4096 * SLOT_BYTES, no_wake, threads=4)
    number, waiting = first, dict[BlockKey, int]()
    while True:
        blocks = []
        while len(waiting) < 16:
            key = key_of(number)
            waiting[key] = number
            blocks.append(BlockIO(key, memoryview(payload_of(key))))
            number += 1
        tier.submit_writes(blocks)
        for completion in tier.poll():
            assert completion.error is None, completion
            os.write(acknowledgements, b"%d\n" % waiting.pop(completion.key))


def _killed_writer(folder: Path, first: int, chance: random.Random) -> set[BlockKey]:
    """Start a writer, kill it at a random moment; returns what it said was durable."""
    source, sink = os.pipe()
    child = os.fork()  # an interpreter of its own would take ten times as long
    if child == 0:
        try:
            os.close(source)
            _write_until_killed(folder, first, sink)
        finally:
            os._exit(1)
    os.close(sink)
    said = b""
    until = time.monotonic() + chance.uniform(0.01, 0.06)
    while (left_s := until - time.monotonic()) > 0 or said.count(b"\n") < ACKNOWLEDGED_MIN:
        if select.select([source], [], [], max(left_s, 0.0) or 5.0)[0]:
            part = os.read(source, 1 << 16)
            assert part, "the writer ended by itself"
            said += part
    os.kill(child, signal.SIGKILL)
    while part := os.read(source, 1 << 16):
        said += part
    os.waitpid(child, 0)
    os.close(source)
    # a line that the kill cut is no acknowledgement
    return {key_of(int(line)) for line in said.split(b"\n")[:-1]}


def _check_all(tier: SsdTier) -> None:
    for key in tier.keys():
        completion, data = read(tier, key)
        assert completion.error is None and data == payload_of(key)


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    """Half of the starts after a kill have the tables, half have lost them."""
    chance = random.Random(11)
    checked = 0
    for number in range(KILL_FOLDERS):
        folder, acknowledged = tmp_path / str(number), set[BlockKey]()
        for round_number in range(KILLS // KILL_FOLDERS):
            acknowledged |= _killed_writer(folder, round_number * 10_000, chance)
            if chance.random() < 0.5:
                lose_tables(folder)
        tier = SsdTier(folder, 4096 * SLOT_BYTES, no_wake)
        lost = [key for key in acknowledged if not tier.contains([key])[0]]
        assert len(lost) <= max(0, len(acknowledged) - 4000), "lost though there was room"
        _check_all(tier)
        checked += len(acknowledged)
        tier.close()
        shutil.rmtree(folder)
    assert checked >= ACKNOWLEDGED_MIN * KILLS


class _Write(NamedTuple):
    path: str
    offset: int
    data: bytes
    started: int
    ended: int


class _Recorder:
    """Notes every write and sync of slabs, each with the moments of its start and end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writes: list[_Write] = []
        self.syncs: list[tuple[str, int, int]] = []
        self._moment = 0
        self._lock = threading.Lock()
        self._real = {name: getattr(os, name) for name in ("pwritev", "fdatasync")}
        monkeypatch.setattr(os, "pwritev", self._pwritev)
        monkeypatch.setattr(os, "fdatasync", self._fdatasync)

    def now(self) -> int:
        with self._lock:
            self._moment += 1
            return self._moment

    def _pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        started, data = self.now(), b"".join(bytes(buffer) for buffer in buffers)
        count: int = self._real["pwritev"](fd, buffers, offset)
        assert count == len(data)
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path.endswith(".slab"):
            self.writes.append(_Write(path, offset, data, started, self.now()))
        return count

    def _fdatasync(self, fd: int) -> None:
        started = self.now()
        self._real["fdatasync"](fd)
        self.syncs.append((os.readlink(f"/proc/self/fd/{fd}"), started, self.now()))

    def is_durable(self, write: _Write, cut: int) -> bool:
        return any(
            path == write.path and write.ended < started and ended < cut
            for path, started, ended in self.syncs
        )


def _after_power_cut(
    recorder: _Recorder, folder: Path, target: Path, cut: int, chance: random.Random
) -> None:
    """A folder as a power cut at ``cut`` may leave it: synced writes are there, of the others
    any sectors are, in any order, and some that were being written have neither what they had
    nor what they were to have."""
    shutil.copytree(folder, target)
    for slab in target.glob("*.slab"):
        slab.write_bytes(bytes(slab.stat().st_size))
    before = [each for each in recorder.writes if each.started < cut]
    durable = [each for each in before if recorder.is_durable(each, cut)]
    for each in sorted(durable, key=lambda each: each.ended):
        overwrite(target / Path(each.path).name, each.offset, each.data)
    sectors = [
        (each, start)
        for each in before
        if each not in durable
        for start in range(0, len(each.data), SECTOR_BYTES)
        if chance.random() < 0.6
    ]
    chance.shuffle(sectors)
    for each, start in sectors:
        data = each.data[start : start + SECTOR_BYTES]
        if chance.random() < 0.3:
            data = chance.randbytes(SECTOR_BYTES)
        overwrite(target / Path(each.path).name, each.offset + start, data)


def _run_workload(recorder: _Recorder, tier: SsdTier) -> dict[BlockKey, list[int]]:
    """Blocks come and go in a small tier; returns when each was acknowledged."""
    acknowledged: dict[BlockKey, list[int]] = {}
    for first in range(0, 90, 3):
        keys = [key_of(i % 50) for i in range(first, first + 3)]
        tier.submit_writes([BlockIO(key, memoryview(payload_of(key))) for key in keys])
        completed = 0
        while completed < 3:
            for completion in tier.poll():
                completed += 1
                assert completion.error is None
                acknowledged.setdefault(completion.key, []).append(recorder.now())
    return acknowledged


@pytest.mark.slow
def test_any_power_cut_leaves_what_was_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this proves: the order of writes and syncs suffices if the disk keeps what
    fdatasync promises, and spoils no sector but those that it is told to write; it may do all
    else, also to entries of durable blocks in a table's page that is written anew."""
    with monkeypatch.context() as patched:
        recorder = _Recorder(patched)
        patched.setattr(slab_space, "SLABS_PER_DEVICE", 2)  # 20 blocks to a page of a table
        tier = SsdTier(tmp_path / "ssd", 40 * SLOT_BYTES, no_wake, threads=4)
        acknowledged = _run_workload(recorder, tier)
        tier.close()
    chance = random.Random(7)
    end = recorder.now()
    checked = 0
    for number in range(40):
        cut, target = chance.randrange(1, end), tmp_path / f"cut{number}"
        _after_power_cut(recorder, tmp_path / "ssd", target, cut, chance)
        tier = SsdTier(target, 40 * SLOT_BYTES, no_wake, threads=1)
        for key in _must_be_there(recorder, acknowledged, cut):
            assert tier.contains([key]) == [True]
            completion, data = read(tier, key)
            assert completion.error is None and data == payload_of(key)
            checked += 1
        for key in tier.keys():
            completion, data = read(tier, key)
            assert completion.error is not None or data == payload_of(key)
        tier.close()
        shutil.rmtree(target)
    assert checked > 200


def _must_be_there(
    recorder: _Recorder, acknowledged: dict[BlockKey, list[int]], cut: int
) -> list[BlockKey]:
    """Acknowledged before the cut, and no other block was begun in the same slot since."""
    keys = []
    for written in recorder.writes:
        if written.offset < table_bytes_of(Path(written.path)):
            continue
        key = decode_header(written.data[:HEADER_BYTES]).key
        moments = [moment for moment in acknowledged[key] if moment > written.ended]
        is_overwritten = any(
            (other.path, other.offset) == (written.path, written.offset)
            and written.started < other.started < cut
            for other in recorder.writes
        )
        if moments and min(moments) < cut and not is_overwritten:
            keys.append(key)
    return keys


def _damage(folder: Path, chance: random.Random) -> None:
    """A flipped bit, a piece cut off, or two equal pieces swapped, anywhere in the folder; of
    slabs, half of the time in the table."""
    path = chance.choice(
        sorted(folder.glob(chance.choice(("*.slab", "*.slab", "owners", "state"))))
    )
    size = path.stat().st_size
    if size < 2:
        return
    what = chance.random()
    if path.suffix == ".slab" and chance.random() < 0.5:
        size = min(size, table_bytes_of(path))
    if what < 0.8:
        flip(path, chance.randrange(size), 1 << chance.randrange(8))
    elif what < 0.82:
        os.truncate(path, chance.randrange(path.stat().st_size))
    else:
        piece = min(size // 2, chance.choice((ENTRY_BYTES, HEADER_BYTES, SLOT_BYTES)))
        first, second = (chance.randrange(size // piece) * piece for _ in range(2))
        data = path.read_bytes()
        overwrite(path, first, data[second : second + piece])
        overwrite(path, second, data[first : first + piece])


@pytest.mark.slow
def test_two_thousand_damages_deliver_nothing_wrong(tmp_path: Path) -> None:
    """In slabs, tables, owners and the state; half of the starts have no right table."""
    chance, folder = random.Random(3), tmp_path / "ssd"
    keys = [key_of(i) for i in range(30)]
    missed = 0
    for round_number in range(40):
        tier = SsdTier(folder, 40 * SLOT_BYTES, no_wake, threads=2)
        write(tier, *keys)
        tier.close()
        for _ in range(52):
            _damage(folder, chance)
        if round_number % 2:
            lose_tables(folder)
        try:
            tier = SsdTier(folder, 40 * SLOT_BYTES, no_wake, threads=2)
        except DirectoryUnusable:  # the state says another format: refused, not misread
            shutil.rmtree(folder)
            continue
        for key in keys:
            completion, data = read(tier, key)
            if completion.error is None:
                assert data == payload_of(key)
            else:
                assert isinstance(completion.error, BlockCorrupt | BlockMissing)
                missed += 1
        tier.close()
    assert 100 < missed < 1150
