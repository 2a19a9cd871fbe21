"""The command line on a remote store."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from storage.remote.tier import RemoteTier
from tests.storage.conftest import QUICK, Run, key_of, no_wake, payload_of, read, settle
from tests.storage.owned_blocks import BOB, fill, label, write_as
from tests.storage.remote.pack_files import flip, packs_in, places_in


def open_tier(folder: Path) -> RemoteTier:
    return RemoteTier(f"file://{folder}", {}, no_wake, QUICK)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill(open_tier(tmp_path / "remote"))
    return tmp_path / "remote"


def test_it_is_looked_at(run: Run, folder: Path) -> None:
    url = f"file://{folder}"
    status, listed = run("ls", url)
    assert status == 0 and key_of(11).hex() in json.dumps(listed)
    status, stats = run("stats", url)
    assert status == 0 and "remote" in json.dumps(stats)
    status, findings = run("doctor", url)
    assert status == 0, findings
    assert run("verify", url)[0] == 0


def test_damage_is_named(run: Run, folder: Path) -> None:
    flip(places_in(folder)[key_of(2)][0], -1)
    status, found = run("verify", f"file://{folder}")
    assert status == 1 and key_of(2).hex() in json.dumps(found)


def test_a_drop_is_seen_by_agents(run: Run, folder: Path) -> None:
    assert run("drop", f"file://{folder}", "--namespace", "version:v1")[0] == 0
    tier = open_tier(folder)
    settle(tier, lambda: tier.has_looked)
    assert sorted(tier.keys()) == sorted(key_of(i) for i in range(10, 13))
    tier.close()


def test_gc_merges_small_packs_and_takes_dropped_blocks_out(run: Run, folder: Path) -> None:
    tier = open_tier(folder)
    settle(tier, lambda: tier.has_looked)
    for number in range(20, 28):
        write_as(tier, label(BOB, "v2"), number)
    tier.close()
    run("drop", f"file://{folder}", "--namespace", "version:v1")
    status, done = run("gc", f"file://{folder}")
    assert status == 0, done
    assert len(packs_in(folder)) == 1
    assert set(places_in(folder)) == {key_of(i) for i in (10, 11, 12, *range(20, 28))}


def test_copies_go_both_ways(run: Run, folder: Path, tmp_path: Path) -> None:
    status, copied = run("copy", f"file://{folder}", f"file://{tmp_path}/other")
    assert status == 0, copied
    status, again = run("copy", f"file://{folder}", f"file://{tmp_path}/other")
    assert status == 0 and "7" in json.dumps(again)
    assert len(places_in(tmp_path / "other")) == 7
    assert run("copy", f"file://{tmp_path}/other", tmp_path / "ssd", "--capacity", "4MiB")[0] == 0
    tier = RemoteTier(
        f"file://{tmp_path}/other", {}, no_wake, msgspec.structs.replace(QUICK, threads=1)
    )
    assert read(tier, key_of(3))[1] == payload_of(key_of(3))
    tier.close()


def test_what_is_no_store_is_said_to_be_none(run: Run, tmp_path: Path) -> None:
    status, sentence = run("ls", f"file://{tmp_path}/nothing")
    assert status == 2 and "holds no store" in sentence
