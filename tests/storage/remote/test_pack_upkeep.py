"""What lies in the remote store stays bounded, dense and quick to find."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from storage.block_format import HEADER_BYTES
from storage.remote.packs import catalog as pack_catalog
from storage.remote.packs.format import ROW, PackContents, new_pack_path
from storage.remote.packs.pack import Pack
from storage.remote.packs.upkeep import LiveRows, UpkeepPlan, plan_upkeep
from storage.remote.settings import RemoteSettings
from storage.remote.tier import RemoteTier
from storage.tiers.contract import BlockMissing
from tests.storage.conftest import (
    BLOCK_BYTES,
    QUICK,
    key_of,
    no_wake,
    payload_of,
    read,
    settle,
    write,
)
from tests.storage.remote.pack_files import flip, packs_in, places_in

STORED_BYTES = HEADER_BYTES + 1000
FULL = RemoteSettings(pack_bytes=10 * STORED_BYTES)


class Packs:
    """Made-up packs of ten blocks, and which of them live."""

    def __init__(self) -> None:
        self.all: list[Pack] = []
        self.live: dict[str, list[int]] = {}

    def add(self, named_ms: int, live: int, namespace: bytes = bytes(32), blocks: int = 10) -> Pack:
        rows = [
            (key_of(named_ms * 100 + i), i * STORED_BYTES, 1000, named_ms, 0, 0)
            for i in range(blocks)
        ]
        contents = PackContents(np.array(rows, ROW), [])
        pack = Pack(new_pack_path(namespace, named_ms), blocks * STORED_BYTES, contents)
        pack.live_blocks, pack.live_bytes = live, live * STORED_BYTES
        self.live[pack.path] = list(range(live))
        self.all.append(pack)
        return pack

    def plan(self, settings: RemoteSettings, now: int = 100, manifest_ms: int = 100) -> UpkeepPlan:
        def live_rows(pack: Pack) -> LiveRows:
            return np.array(self.live[pack.path], np.int64)

        return plan_upkeep(self.all, live_rows, settings, now, manifest_ms)


def rewritten(plan: UpkeepPlan) -> list[list[tuple[str, int]]]:
    return [[(pack.path, len(rows)) for pack, rows in r.sources] for r in plan.rewrites]


def test_full_packs_with_live_blocks_are_left_alone() -> None:
    packs = Packs()
    packs.add(1, live=10)
    packs.add(2, live=6)
    assert not packs.plan(FULL)


def test_packs_that_mostly_died_are_rewritten_or_deleted() -> None:
    packs = Packs()
    dying, dead = packs.add(1, live=4), packs.add(2, live=0)
    plan = packs.plan(FULL)
    assert plan.delete == [dead] and rewritten(plan) == [[(dying.path, 4)]]


def test_what_is_rewritten_fills_packs_of_one_namespace() -> None:
    packs = Packs()
    ours = [packs.add(i, live=4).path for i in range(3)]
    other = packs.add(9, live=4, namespace=b"o" * 32).path
    assert rewritten(packs.plan(FULL)) == [
        [(ours[0], 4), (ours[1], 4)],
        [(ours[2], 4)],
        [(other, 4)],
    ]


def test_many_small_packs_become_one() -> None:
    packs = Packs()
    small = [packs.add(i, live=1, blocks=1).path for i in range(8)]
    assert rewritten(packs.plan(FULL)) == [[(path, 1) for path in small]]
    few = Packs()
    for i in range(7):
        few.add(i, live=1, blocks=1)
    assert not few.plan(FULL)


def test_expired_blocks_go() -> None:
    packs = Packs()
    old, young = packs.add(1_000, live=10), packs.add(9_000, live=10)
    mixed = packs.add(8_000, live=10)
    mixed.rows["written_ms"][:7] = 1_000
    plan = packs.plan(msgspec.structs.replace(FULL, ttl_s=5), now=10_000)
    assert plan.delete == [old] and rewritten(plan) == [[(mixed.path, 3)]]
    assert young.path not in str(plan.rewrites)


def test_the_oldest_packs_go_beyond_the_capacity() -> None:
    packs = Packs()
    made = [packs.add(i, live=10) for i in range(10)]
    size = made[0].nbytes
    capacity = msgspec.structs.replace(FULL, capacity_bytes=10 * size)
    assert not packs.plan(capacity)
    capacity = msgspec.structs.replace(FULL, capacity_bytes=8 * size)
    assert packs.plan(capacity).delete == made[:3], "down to 95 % of it"


def test_a_manifest_is_due_when_many_packs_are_in_none() -> None:
    packs = Packs()
    for i in range(100):
        packs.add(i, live=10)
    assert packs.plan(FULL, manifest_ms=80).manifest is None
    assert packs.plan(FULL, manifest_ms=70).manifest == packs.all


# ---- over a real folder ---------------------------------------------------------------------

Open = Callable[..., RemoteTier]


@pytest.fixture
def open_remote(tmp_path: Path) -> Iterator[Open]:
    tiers: list[RemoteTier] = []

    def open_with(**settings: Any) -> RemoteTier:
        changed = msgspec.structs.replace(QUICK, **settings)
        tiers.append(RemoteTier(f"file://{tmp_path}/remote", {}, no_wake, changed))
        return tiers[-1]

    yield open_with
    for tier in tiers:
        tier.close()


def write_packs(tier: RemoteTier, packs: int, blocks: int = 2) -> None:
    for number in range(packs):
        write(tier, *(key_of(number * blocks + i) for i in range(blocks)))


def test_small_packs_are_merged_and_every_block_stays(open_remote: Open, tmp_path: Path) -> None:
    keys = [key_of(i) for i in range(18)]
    write_packs(open_remote(), 9)
    reader = open_remote()
    settle(reader, lambda: all(reader.contains(keys)))
    tier = open_remote(upkeep_s=0.1)
    settle(tier, lambda: len(packs_in(tmp_path / "remote")) == 1)
    for key in keys:
        assert read(tier, key)[1] == payload_of(key)
        assert read(reader, key)[1] == payload_of(key), "its packs have gone"
    assert set(places_in(tmp_path / "remote")) == set(keys)


def test_a_damaged_block_is_not_carried_over(open_remote: Open, tmp_path: Path) -> None:
    write_packs(open_remote(), 9)
    flip(places_in(tmp_path / "remote")[key_of(4)][0], -1)
    tier = open_remote(upkeep_s=0.1)
    settle(tier, lambda: len(packs_in(tmp_path / "remote")) == 1)
    assert isinstance(read(tier, key_of(4))[0].error, BlockMissing)
    assert set(places_in(tmp_path / "remote")) == {key_of(i) for i in range(18) if i != 4}


def test_only_one_of_many_works_in_a_period(open_remote: Open, tmp_path: Path) -> None:
    """Where the work takes longer than a period, two may do it at once; both packs are seen at
    the next look then, and one of them goes."""
    write_packs(open_remote(), 9)
    tiers = [open_remote(upkeep_s=1.0, refresh_s=0.5) for _ in range(3)]
    end = time.monotonic() + 20
    while len(packs_in(tmp_path / "remote")) != 1:
        for tier in tiers:
            assert tier.poll() == [] and time.monotonic() < end
        time.sleep(0.01)
    assert len(list((tmp_path / "remote" / "upkeep").iterdir())) <= 2


def test_two_writers_of_the_same_blocks_are_harmless(open_remote: Open, tmp_path: Path) -> None:
    first, second = open_remote(), open_remote()
    keys = [key_of(i) for i in range(6)]
    settle(first, lambda: True)
    settle(second, lambda: True)
    write(first, *keys)
    write(second, *keys)
    assert all(len(places) == 2 for places in places_in(tmp_path / "remote").values())
    keeper = open_remote(upkeep_s=0.1)
    settle(keeper, lambda: len(packs_in(tmp_path / "remote")) == 1)
    for tier in (first, second, keeper):
        for key in keys:
            assert read(tier, key)[1] == payload_of(key)


def test_the_store_stays_within_its_capacity(open_remote: Open, tmp_path: Path) -> None:
    capacity_bytes = 20 * (BLOCK_BYTES + HEADER_BYTES)
    tier = open_remote(upkeep_s=0.1, capacity_bytes=capacity_bytes)
    write_packs(tier, 15)

    def stored_bytes() -> int:
        return sum(path.stat().st_size for path in packs_in(tmp_path / "remote"))

    def is_within() -> bool:
        stored = stored_bytes()
        return stored <= capacity_bytes and tier.stats().room.used_bytes == stored

    settle(tier, is_within)
    assert read(tier, key_of(29))[1] == payload_of(key_of(29)), "the youngest stays"
    assert isinstance(read(tier, key_of(0))[0].error, BlockMissing)


def test_blocks_go_when_they_are_old(open_remote: Open, tmp_path: Path) -> None:
    tier = open_remote(upkeep_s=0.1, ttl_s=0.5)
    write(tier, key_of(1))
    settle(tier, lambda: tier.contains([key_of(1)]) == [False])
    settle(tier, lambda: not packs_in(tmp_path / "remote"))


def manifests(root: Path) -> list[Path]:
    return sorted((root / "remote" / "manifest").glob("*.parquet"))


@pytest.mark.parametrize("damage", ["none", "flip", "cut", "empty"])
def test_a_start_reads_a_manifest_or_does_without(
    open_remote: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    writer = open_remote(pack_bytes=1)
    write_packs(writer, 20)
    writer.close()  # so that there is one manifest, of all packs
    keeper = open_remote(upkeep_s=0.1, pack_bytes=1)
    settle(keeper, lambda: bool(manifests(tmp_path)))
    keeper.close()
    path = manifests(tmp_path)[-1]
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[: {"cut": len(data) // 2, "empty": 0}.get(damage, len(data))])
    footers = []
    real = pack_catalog.read_footer

    def read_and_count(calls, found):
        footers.append(found)
        return real(calls, found)

    monkeypatch.setattr(
        pack_catalog,
        "read_footer",
        read_and_count,
    )
    again = open_remote()
    keys = [key_of(i) for i in range(40)]
    settle(again, lambda: all(again.contains(keys)))
    assert (not footers) == (damage == "none")
    for key in keys[::7]:
        assert read(again, key)[1] == payload_of(key)
