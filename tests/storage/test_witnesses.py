"""Witnesses of namespaces stay where blocks stay: the first one, in every place."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from storage import witnesses as witnesses_module
from storage.remote.packs import upkeep as pack_upkeep
from storage.remote.tier import RemoteTier
from storage.ssd.tier import SsdTier
from storage.witnesses import FolderKeeper, Keeper, Witnesses
from tests.storage.conftest import BLOCK_BYTES, QUICK, key_of, no_wake, settle, write

ONE, OTHER = bytes(32), b"\1" * 32
Open = Callable[[], Keeper]


@pytest.fixture(params=["ssd", "remote"])
def place(request: pytest.FixtureRequest, tmp_path: Path):
    """Opens the tier's keeper, again and again."""
    tiers: list[SsdTier | RemoteTier] = []

    def open_keeper() -> Keeper:
        while tiers and request.param == "ssd":  # its folder has one owner
            tiers.pop().close()
        if request.param == "ssd":
            tiers.append(SsdTier(tmp_path, 40 * BLOCK_BYTES, no_wake, threads=1))
        else:
            tiers.append(RemoteTier(f"file://{tmp_path}", {}, no_wake, QUICK))
        (keeper,) = tiers[-1].keepers
        return keeper

    yield open_keeper
    for tier in tiers:
        tier.close()


def ask(witnesses: Witnesses, digest: bytes, values: bytes = b"") -> list[bytes]:
    answers: queue.Queue[list[bytes]] = queue.Queue()
    witnesses.compare(digest, values, answers.put)
    return answers.get(timeout=20)


def test_the_first_one_stays_for_the_next_process_too(place: Open) -> None:
    witnesses = Witnesses([place()])
    assert ask(witnesses, ONE) == []
    assert ask(witnesses, ONE, b"first") == ask(witnesses, ONE, b"second") == [b"first"]
    assert ask(witnesses, OTHER, b"other") == [b"other"]
    again = Witnesses([place()])
    assert ask(again, ONE) == ask(again, ONE, b"third") == [b"first"]


def test_of_many_that_write_at_once_one_is_kept(tmp_path: Path) -> None:
    for keepers in ([FolderKeeper(tmp_path) for _ in range(8)],):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda k, n: k.create(ONE, bytes([n]) * 9000), keepers, range(8)))
        kept = {keeper.read(ONE) for keeper in keepers}
        assert len(kept) == 1 and len(kept.pop()) == 9000
    assert len(list(tmp_path.iterdir())) == 1


def test_places_that_differ_are_all_told(tmp_path: Path) -> None:
    places = [tmp_path / "a", tmp_path / "b", tmp_path / "new"]
    for place in places:
        place.mkdir()
    keepers = [FolderKeeper(place) for place in places]
    ask(Witnesses(keepers[:1]), ONE, b"first")
    ask(Witnesses(keepers[1:2]), ONE, b"second")
    assert ask(Witnesses(keepers), ONE, b"third") == [b"first", b"second"]
    assert ask(Witnesses(keepers[2:]), ONE) == [b"first"]


def test_a_damaged_one_is_none_and_is_replaced(place: Open) -> None:
    keeper = place()
    assert ask(Witnesses([keeper]), ONE, b"first" * 1000) == [b"first" * 1000]
    kept = bytearray(keeper.read(ONE))
    for damaged in (bytes(kept[: len(kept) // 2]), bytes(kept[:-1]) + b"\xa5", b"\xa5"):
        keeper.remove(ONE)
        keeper.create(ONE, damaged)
        assert ask(Witnesses([keeper]), ONE) == []
        assert keeper.read(ONE) == b""
    assert ask(Witnesses([keeper]), ONE, b"second") == [b"second"]
    assert ask(Witnesses([place()]), ONE) == [b"second"]


def test_without_any_place_they_last_as_long_as_dram() -> None:
    witnesses = Witnesses([])
    assert ask(witnesses, ONE, b"first") == ask(witnesses, ONE, b"second") == [b"first"]


def test_a_place_that_fails_hides_no_other(tmp_path: Path) -> None:
    class Broken:
        def read(self, namespace_digest: bytes) -> bytes:
            raise OSError("the disk is gone")

        def create(self, namespace_digest: bytes, values: bytes) -> None:
            raise OSError("the disk is gone")

        def remove(self, namespace_digest: bytes) -> None:
            raise OSError("the disk is gone")

    witnesses = Witnesses([Broken(), FolderKeeper(tmp_path)])
    assert ask(witnesses, ONE, b"first") == [b"first"]
    assert ask(Witnesses([FolderKeeper(tmp_path)]), ONE) == [b"first"]


def test_those_that_are_kept_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witnesses_module, "KEPT_MAX", 5)
    witnesses = Witnesses([FolderKeeper(tmp_path)])
    for number in range(20):
        digest = number.to_bytes(32, "big")
        assert ask(witnesses, digest, b"values") == [b"values"]
        os.utime(tmp_path / f"witness-{digest.hex()}", ns=(number, number))
    assert len(list(tmp_path.iterdir())) <= 6


def test_they_are_their_user_s_alone(tmp_path: Path) -> None:
    FolderKeeper(tmp_path).create(ONE, b"first")
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_one_without_a_pack_leaves_the_remote_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_upkeep, "LEFTOVER_MS", 0)
    settings = msgspec.structs.replace(QUICK, upkeep_s=0.1, refresh_s=0.05, ttl_s=0.4)
    tier = RemoteTier(f"file://{tmp_path}", {}, no_wake, settings)
    (keeper,) = tier.keepers
    write(tier, key_of(1))  # of namespace ONE
    keeper.create(ONE, b"first")
    keeper.create(OTHER, b"nobody's")
    seen: list[tuple[bytes, bytes]] = []

    def gone() -> bool:
        seen.append((keeper.read(ONE), keeper.read(OTHER)))
        return seen[-1] == (b"", b"")

    settle(tier, gone)
    assert (b"first", b"") in seen or seen[-2][0] == b"first"
    tier.close()
