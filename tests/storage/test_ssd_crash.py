"""What was acknowledged survives, and nothing wrong is ever delivered: kill -9, power cuts
replayed from a record of the writes, random damage."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import key_of, no_wake, payload_of, read, write
from slab_files import cut_power, flip

from storage.block import BlockKey
from storage.block_format import decode_header
from storage.slab import slot_bytes_for
from storage.ssd_tier import SsdTier
from storage.tier import BlockCorrupt, BlockIO, BlockMissing

SLOT_BYTES = slot_bytes_for(len(payload_of(key_of(0))))
PAGE_BYTES = 4096

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


def _check_all(tier: SsdTier) -> None:
    for key in tier.keys():
        completion, data = read(tier, key)
        assert completion.error is None and data == payload_of(key)


@pytest.mark.parametrize("power", [True, False], ids=["kept", "cut"])
def test_what_was_acknowledged_survives_kill_9(tmp_path: Path, power: bool) -> None:
    directory, acknowledged = tmp_path / "ssd", set[BlockKey]()
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
        if not power:
            cut_power(directory)
    tier = SsdTier(directory, 1 << 30, no_wake)
    assert len(acknowledged) > 200
    assert all(tier.contains(list(acknowledged)))
    _check_all(tier)
    tier.close()


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
    any pages are, in any order."""
    shutil.copytree(folder, target)
    for slab in target.glob("*.slab"):
        slab.write_bytes(bytes(slab.stat().st_size))
    cut_power(target)
    before = [each for each in recorder.writes if each.started < cut]
    durable = [each for each in before if recorder.is_durable(each, cut)]
    pages = [
        (each, start)
        for each in before
        if each not in durable
        for start in range(0, len(each.data), PAGE_BYTES)
        if chance.random() < 0.6
    ]
    chance.shuffle(pages)
    whole = [(each, 0, len(each.data)) for each in sorted(durable, key=lambda e: e.ended)]
    torn = [(each, start, start + PAGE_BYTES) for each, start in pages]
    for page, start, end in whole + torn:
        with (target / Path(page.path).name).open("r+b") as file:
            file.seek(page.offset + start)
            file.write(page.data[start:end])


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


def test_any_power_cut_leaves_what_was_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this proves: the order of writes and syncs suffices if the disk keeps what
    fdatasync promises, tears nothing smaller than a page, and may do all else."""
    with monkeypatch.context() as patched:
        recorder = _Recorder(patched)
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
        key = decode_header(written.data[:PAGE_BYTES]).key
        moments = [moment for moment in acknowledged[key] if moment > written.ended]
        is_overwritten = any(
            (other.path, other.offset) == (written.path, written.offset)
            and written.started < other.started < cut
            for other in recorder.writes
        )
        if moments and min(moments) < cut and not is_overwritten:
            keys.append(key)
    return keys


def test_two_thousand_flipped_bits_deliver_nothing_wrong(tmp_path: Path) -> None:
    """Anywhere in slabs and tables; half of the starts believe the tables."""
    chance, folder = random.Random(3), tmp_path / "ssd"
    keys = [key_of(i) for i in range(30)]
    missed = 0
    for round_number in range(20):
        tier = SsdTier(folder, 40 * SLOT_BYTES, no_wake, threads=2)
        write(tier, *keys)
        tier.close()
        files = [*folder.glob("*.slab"), *folder.glob("*.slots")]
        for _ in range(100):
            path = chance.choice(files)
            flip(path, chance.randrange(path.stat().st_size), 1 << chance.randrange(8))
        if round_number % 2:
            (folder / "state").unlink()
        tier = SsdTier(folder, 40 * SLOT_BYTES, no_wake, threads=2)
        for key in keys:
            completion, data = read(tier, key)
            if completion.error is None:
                assert data == payload_of(key)
            else:
                assert isinstance(completion.error, BlockCorrupt | BlockMissing)
                missed += 1
        tier.close()
    assert missed > 350
