"""Whatever happens to the bytes in the store, no wrong block comes out of it."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from storage.remote.tier import RemoteTier
from storage.tiers.contract import BlockCorrupt, BlockIO, BlockMissing
from tests.storage.conftest import BLOCK_BYTES, QUICK, key_of, no_wake, payload_of, write

ROUNDS = 70
DAMAGES = (5, 55)
"""In rounds in turn, 2,100 in all: a store of which most is whole, and one of which little is."""
KEYS = [key_of(i) for i in range(60)]


@pytest.mark.slow
def test_no_damage_delivers_a_wrong_block(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    _fill(whole)
    chance = random.Random(4)
    seen: Counter[str] = Counter()
    for number in range(ROUNDS):
        damaged = tmp_path / f"{number}"
        shutil.copytree(whole, damaged)
        files = sorted(path for path in damaged.rglob("*") if path.suffix in (".pack", ".parquet"))
        for _ in range(DAMAGES[number % 2]):
            _damage(chance, chance.choice(files), files)
        seen += _read_all(damaged)
        shutil.rmtree(damaged)
    assert seen["wrong"] == 0
    assert seen["right"] and seen["lost"], dict(seen)


def _fill(folder: Path) -> None:
    settings = msgspec.structs.replace(QUICK, upkeep_s=0.1, pack_bytes=1)
    tier = RemoteTier(f"file://{folder}", {}, no_wake, settings)
    for start in range(0, len(KEYS), 3):
        write(tier, *KEYS[start : start + 3])
    end = time.monotonic() + 20
    while not list(folder.glob("manifest/*.parquet")):
        assert tier.poll() == [] and time.monotonic() < end
        time.sleep(0.01)
    tier.close()


def _damage(chance: random.Random, path: Path, files: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    kind = chance.choice(("flip", "flip", "flip", "footer", "cut", "swap", "zeros"))
    at = chance.randrange(max(1, len(data)))
    if kind == "flip" and data:
        data[at] ^= 1 << chance.randrange(8)
    elif kind == "footer" and data:
        data[-1 - chance.randrange(min(400, len(data)))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "swap":
        data[:] = chance.choice(files).read_bytes()
    elif kind == "zeros":
        data[at : at + 500] = bytes(len(data[at : at + 500]))
    path.write_bytes(data)


def _read_all(folder: Path) -> Counter[str]:
    tier = RemoteTier(f"file://{folder}", {}, no_wake, QUICK)
    seen: Counter[str] = Counter()
    buffers = {key: bytearray(BLOCK_BYTES) for key in KEYS}
    try:
        tier.submit_reads([BlockIO(key, memoryview(buffer)) for key, buffer in buffers.items()])
        end = time.monotonic() + 20
        while sum(seen.values()) < len(KEYS):
            for completion in tier.poll():
                if completion.error is not None:
                    assert isinstance(completion.error, (BlockCorrupt, BlockMissing))
                    seen["lost"] += 1
                else:
                    is_right = buffers[completion.key] == payload_of(completion.key)
                    seen["right" if is_right else "wrong"] += 1
            assert time.monotonic() < end
            time.sleep(0.001)
    finally:
        tier.close()
    return seen
