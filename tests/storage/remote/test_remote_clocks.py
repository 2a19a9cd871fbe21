"""Drops and packs where hosts' clocks differ, or one is plainly wrong."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.block import BlockLabel, BlockLayout
from storage.block_format import encode_header
from storage.index.owners import Selector
from storage.remote.packs import format as pack_format
from storage.remote.packs import upkeep as pack_upkeep
from storage.remote.tier import RemoteTier
from storage.tiers.contract import BlockIO
from tests.storage.conftest import finish, key_of, payload_of, read, settle
from tests.storage.remote.conftest import Open
from tests.storage.remote.pack_files import packs_in

STEP_1 = BlockLabel(bytes(32), BlockLayout(64, 2, (8,)), weight_version="step-1")


def write_step_1(tier: RemoteTier, number: int) -> None:
    key = key_of(number)
    tier.submit_writes([BlockIO(key, memoryview(payload_of(key)), STEP_1)])
    assert finish(tier, 1)[key].error is None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set this host's clock so many seconds ahead."""

    def set_ahead(seconds: float) -> None:
        ahead_ms = int(seconds * 1000)
        monkeypatch.setattr(pack_format, "now_ms", lambda: time.time_ns() // 1_000_000 + ahead_ms)

    return set_ahead


def test_a_drop_takes_what_was_written_before_it_whatever_clocks_say(
    open_remote: Open, url: str, clock: Callable[[float], None]
) -> None:
    ours, theirs = open_remote(url), open_remote(url, refresh_s=0.05)
    clock(600)  # the writer's is ahead
    write_step_1(theirs, 1)
    clock(0)
    settle(ours, lambda: isinstance(read(ours, key_of(1))[1], bytes))
    ours.drop(Selector.parse("version:step-1"))
    assert ours.contains([key_of(1)]) == [False]
    settle(theirs, lambda: theirs.contains([key_of(1)]) == [False])
    clock(-600)  # and now behind
    write_step_1(theirs, 2)
    keys = [key_of(1), key_of(2)]
    settle(theirs, lambda: theirs.contains(keys) == [False, True])
    again = open_remote(url)
    settle(again, lambda: again.contains(keys) == [False, True])


def test_nobody_s_clock_follows_one_far_in_the_future(
    open_remote: Open, url: str, clock: Callable[[float], None], tmp_path: Path, caplog
) -> None:
    wrong = open_remote(url)
    clock(100 * 86400)
    write_step_1(wrong, 1)
    clock(0)
    ours = open_remote(url)
    settle(ours, lambda: ours.contains([key_of(1)]) == [True])
    assert "ahead of this host's clock" in caplog.text
    write_step_1(ours, 2)
    newest = max(pack_format.written_ms_of(str(p)) for p in packs_in(tmp_path / "remote")[:1])
    assert newest < pack_format.now_ms() + 1000
    ours.drop(Selector.parse("version:step-1"))
    settle(ours, lambda: ours.contains([key_of(1), key_of(2)]) == [False, False])
    again = open_remote(url)
    write_step_1(again, 3)
    settle(again, lambda: again.contains([key_of(i) for i in (1, 2, 3)]) == [False, False, True])


def test_a_drop_of_a_wrong_clock_takes_what_there_is_now(
    open_remote: Open, url: str, clock: Callable[[float], None], tmp_path: Path, caplog
) -> None:
    wrong = open_remote(url)
    write_step_1(wrong, 1)
    clock(100 * 86400)
    wrong.drop(Selector.parse("version:step-1"))
    settle(wrong, lambda: bool(list(tmp_path.glob("remote/drops/*.json"))))
    clock(0)
    ours = open_remote(url)
    settle(ours, lambda: ours.has_looked)
    assert ours.contains([key_of(1)]) == [False] and "taken for one of now" in caplog.text
    write_step_1(ours, 2)
    assert ours.contains([key_of(2)]) == [True]
    (far,) = tmp_path.glob("remote/drops/*.json")
    keeper = open_remote(url, refresh_s=0.05, upkeep_s=0.05)
    settle(keeper, lambda: far not in tmp_path.glob("remote/drops/*.json"))
    (near,) = tmp_path.glob("remote/drops/*.json")
    assert int(near.name[:12], 16) <= pack_format.now_ms()
    write_step_1(ours, 3)
    again = open_remote(url)
    settle(again, lambda: again.contains([key_of(i) for i in (1, 3)]) == [False, True])


def test_a_drop_takes_what_was_written_after_its_pack_was_named(
    open_remote: Open, url: str, tmp_path: Path
) -> None:
    ours, key, now = open_remote(url, refresh_s=0.05), key_of(1), pack_format.now_ms()
    builder, block = pack_format.PackBuilder(), encode_header(key, payload_of(key), STEP_1)
    block += payload_of(key)
    builder.add(key, len(payload_of(key)), now + 600_000, STEP_1)
    path = tmp_path / "remote" / pack_format.new_pack_path(bytes(32), now)
    path.parent.mkdir(parents=True)
    path.write_bytes(block + builder.footer())
    settle(ours, lambda: ours.contains([key]) == [True])
    ours.drop(Selector.parse("version:step-1"))
    settle(ours, lambda: bool(list(tmp_path.glob("remote/drops/*.json"))))
    again = open_remote(url)
    settle(again, lambda: again.has_looked)
    assert again.contains([key]) == [False]


def test_drops_stay_while_there_are_packs_that_nobody_here_can_read(
    open_remote: Open, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_upkeep, "DROP_KEPT_MS", 0)
    write_step_1(open_remote(url), 1)
    (newer,) = packs_in(tmp_path / "remote")
    data = bytearray(newer.read_bytes())
    struct.pack_into("<I", data, len(data) - 48 + 8, 99)
    newer.write_bytes(data)
    tier = open_remote(url, refresh_s=0.05, upkeep_s=0.05)
    tier.drop(Selector.parse("version:step-1"))
    folder, leases = tmp_path / "remote" / "drops", tmp_path / "remote" / "upkeep"
    settle(tier, lambda: bool(list(folder.glob("*"))))
    for number in range(2, 5):  # so that upkeep has something to do
        write_step_1(tier, number)
        tier.drop(Selector.parse("version:step-1"))
    settle(tier, lambda: packs_in(tmp_path / "remote") == [newer])
    assert list(leases.glob("*")) and len(list(folder.glob("*"))) == 4
    newer.unlink()
    settle(tier, lambda: not list(folder.glob("*")))


def test_drops_go_once_they_cover_nothing(
    open_remote: Open, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_upkeep, "DROP_KEPT_MS", 0)
    tier = open_remote(url, refresh_s=0.05, upkeep_s=0.1)
    other = open_remote(url, refresh_s=0.05, upkeep_s=3600)
    write_step_1(tier, 1)
    for version in range(20):
        tier.drop(Selector.parse(f"version:step-{version}"))
    folder = tmp_path / "remote" / "drops"
    settle(other, lambda: 0 < len(other.drops) <= 20)

    def left() -> list[str]:
        other.poll()
        return [str(drop.selector) for drop in other.drops.values()]

    # the pack itself goes first, and then the last drop
    settle(tier, lambda: not list(folder.glob("*")) and not tier.drops and not left())
    assert tier.contains([key_of(1)]) == other.contains([key_of(1)]) == [False]
