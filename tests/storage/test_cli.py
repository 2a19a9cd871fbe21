"""The command line on good, damaged, live and foreign stores."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.block import tenant_digest
from storage.cli import main
from storage.ssd.slab import slot_bytes_for
from storage.ssd.tier import SsdTier
from storage.tools import verify as verify_tool
from tests.storage.conftest import BLOCK_BYTES, Run, key_of, no_wake, payload_of, read
from tests.storage.owned_blocks import ANN, BOB, fill, held, label
from tests.storage.ssd.slab_files import flip, lose_tables, overwrite, place_of

SLOT_BYTES = slot_bytes_for(BLOCK_BYTES)
CAPACITY_BYTES = 128 * SLOT_BYTES


def open_tier(folder: Path) -> SsdTier:
    return SsdTier(folder, CAPACITY_BYTES, no_wake, threads=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill(open_tier(tmp_path / "ssd"))
    return tmp_path / "ssd"


@pytest.fixture
def live(folder: Path) -> Iterator[SsdTier]:
    """The folder's tier, polled all the time as by an agent."""
    tier = open_tier(folder)
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(0.01):
            assert tier.poll() == []

    thread = threading.Thread(target=poll)
    thread.start()
    yield tier
    ended.set()
    thread.join()
    tier.close()


def test_stats_say_whose_blocks_there_are(run: Run, folder: Path) -> None:
    status, result = run("stats", folder)
    assert status == 0 and result["blocks"] == 7 and result["used_by"] is None
    assert result["payload_bytes"] == 7 * BLOCK_BYTES
    assert {(o["version"], o["tenant_digest"]): o["blocks"] for o in result["owners"]} == {
        ("v1", tenant_digest(ANN)): 4,
        ("v2", tenant_digest(BOB)): 3,
    }
    assert result["ages"]["under an hour"] == 7


def test_stats_of_a_live_store_show_its_counters(run: Run, live: SsdTier, folder: Path) -> None:
    status, result = run("stats", folder)
    assert status == 0 and result["used_by"] and result["blocks"] == 7
    assert result["counters"]["stats"]["blocks"] == 7


def test_ls_lists_blocks_of_an_owner(run: Run, folder: Path) -> None:
    status, rows = run("ls", folder, "--namespace", f"tenant:{BOB}")
    assert status == 0
    assert sorted(row["key"] for row in rows) == sorted(key_of(i).hex() for i in range(10, 13))
    assert len(run("ls", folder, "--limit", 2)[1]) == 2


def test_doctor_finds_a_good_store_good(run: Run, folder: Path) -> None:
    status, findings = run("doctor", folder, "--min-free-bytes", 0)
    assert status == 0 and {f["verdict"] for f in findings} <= {"ok", "warning"}
    assert {f["check"] for f in findings} >= {"permissions", "versions", "checksums", "speed"}


def test_doctor_says_why_nothing_will_be_read(run: Run, folder: Path) -> None:
    place = place_of(folder, key_of(1))
    flip(place.path, place.offset + 5000)
    place = place_of(folder, key_of(2))
    overwrite(place.path, place.offset + 8, struct.pack("<I", 9))
    status, findings = run(
        *("doctor", folder, "--namespace", "version:v7", "--expect-bytes-per-s", "100TB"),
        *("--min-free-bytes", "1000TB"),
    )
    by_check = {f["check"]: f for f in findings}
    assert status == 1
    assert by_check["checksums"]["verdict"] == by_check["namespace"]["verdict"] == "bad"
    assert "0 blocks of version:v7" in by_check["namespace"]["found"]
    for check in ("versions", "room", "speed"):
        assert by_check[check]["verdict"] == "warning" and by_check[check]["advice"]


def test_verify_names_each_damaged_block(run: Run, folder: Path) -> None:
    assert run("verify", folder)[0] == 0
    place = place_of(folder, key_of(11))
    flip(place.path, place.offset + 6000)
    status, result = run("verify", folder)
    assert status == 1 and result["blocks"] == 7
    assert [damaged["key"] for damaged in result["damaged"]] == [key_of(11).hex()]
    assert run("verify", folder, "--namespace", "version:v1")[0] == 0


def test_verify_goes_on_where_it_was_cut_short(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, checked = tmp_path / "state", 0
    monkeypatch.setattr(verify_tool, "SAVE_EVERY_BLOCKS", 1)
    place = place_of(folder, min(key_of(i) for i in range(4)))
    flip(place.path, place.offset + 6000)
    note = verify_tool._note

    def note_and_stop(*arguments: Any) -> None:
        nonlocal checked
        checked += 1
        if checked == 6:
            raise KeyboardInterrupt
        note(*arguments)

    monkeypatch.setattr(verify_tool, "_note", note_and_stop)
    assert run("verify", folder, "--resume", state)[0] == 130
    assert state.exists()
    status, result = run("verify", folder, "--resume", state)
    assert status == 1 and result["blocks"] == 7 and len(result["damaged"]) == 1
    assert checked == 6 + 2, "what was done before is not done again"
    assert not state.exists()


def test_gc_gives_back_what_nothing_can_read(run: Run, folder: Path) -> None:
    place = place_of(folder, key_of(2))
    overwrite(place.path, place.offset + 8, struct.pack("<I", 9))
    lose_tables(folder)  # so that headers count
    run("drop", folder, "--namespace", f"tenant:{BOB}")
    tier = open_tier(folder)
    tier.poll()
    tier.close()
    status, result = run("gc", folder)
    assert status == 0
    assert result["blocks of other versions"] == 1
    assert result["dropped, damaged or doubled blocks"] == 3
    assert run("gc", folder)[1] == {}
    tier = open_tier(folder)
    assert held(tier) == {0, 1, 3}
    tier.close()


def test_gc_leaves_a_live_store_alone(run: Run, live: SsdTier, folder: Path) -> None:
    status, error = run("gc", folder)
    assert status == 2 and "in use by process" in error


def test_a_live_store_drops_what_it_is_asked_to(run: Run, live: SsdTier, folder: Path) -> None:
    status, result = run("drop", folder, "--namespace", "version:v1")
    assert status == 0 and result["outcome"].startswith("dropped by process")
    assert held(live) == {10, 11, 12}


def test_a_drop_of_a_store_that_is_closed_is_seen_by_its_next_owner(run: Run, folder: Path) -> None:
    assert run("drop", folder, "--namespace", "version:v1")[0] == 0
    tier = open_tier(folder)
    assert held(tier) == {10, 11, 12}
    tier.close()


def test_copy_takes_what_is_missing(run: Run, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    capacity = ("--capacity", CAPACITY_BYTES)
    assert run("copy", folder, target)[0] == 2, "it must be told how large it may become"
    status, result = run("copy", folder, target, *capacity, "--namespace", "version:v1")
    assert status == 0 and result["copied"] == 4
    status, result = run("copy", folder, target, *capacity)
    assert (result["copied"], result["there_already"]) == (3, 4)
    tier = open_tier(target)
    for i in (0, 3, 10, 12):
        completion, data = read(tier, key_of(i))
        assert data == payload_of(key_of(i))
        assert completion.label == (label(ANN, "v1") if i < 10 else label(BOB, "v2"))
    tier.close()


def test_copy_leaves_damaged_blocks_behind_and_says_so(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    place = place_of(folder, key_of(1))
    flip(place.path, place.offset + 6000)
    status, result = run("copy", folder, tmp_path / "copy", "--capacity", CAPACITY_BYTES)
    assert status == 1 and (result["copied"], result["unreadable"]) == (6, 1)


def test_copy_into_a_live_store_is_refused(
    run: Run, live: SsdTier, folder: Path, tmp_path: Path
) -> None:
    run("copy", folder, tmp_path / "copy", "--capacity", CAPACITY_BYTES)
    status, error = run("copy", tmp_path / "copy", folder)
    assert status == 2 and "only that process may write" in error


def test_a_live_store_goes_on_while_it_is_looked_at(run: Run, live: SsdTier, folder: Path) -> None:
    for command in ("stats", "ls", "verify", "doctor"):
        assert run(command, folder)[0] == 0
    assert run("bench", folder, "--seconds", 0.05)[1]["verified_read_per_s_bytes"] > 0
    assert held(live) == {0, 1, 2, 3, 10, 11, 12}


@pytest.mark.parametrize("name", ["missing", "empty", "older"])
def test_what_is_no_store_is_said_to_be_none(run: Run, tmp_path: Path, name: str) -> None:
    if name != "missing":
        (tmp_path / name).mkdir()
    if name == "older":
        (tmp_path / name / "state").write_text('{"format":2,"boot_id":"","is_closed":true}')
    status, error = run("stats", tmp_path / name)
    assert status == 2 and str(tmp_path / name) in error


def test_people_get_tables(
    run: Run, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for command in ("stats", "doctor", "ls", "verify", "bench"):
        extra = ["--seconds", "0.05"] if command == "bench" else []
        assert main([command, str(folder), *extra]) == 0
        assert capsys.readouterr().out.strip()
