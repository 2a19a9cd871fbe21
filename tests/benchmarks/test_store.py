"""The storage benchmark measures what it says, at a size that takes a moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.replay import __main__ as replay
from benchmarks.store import eviction as store_eviction
from benchmarks.store import index as store_index
from benchmarks.store import load as store_load
from benchmarks.store.__main__ import goals_of
from benchmarks.store.load import DEPTH, LoadFailed, Memory, RawFile, SsdLoad, busy_thread
from common.block import BlockKey

BLOCK_BYTES = 16 << 10


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_load, "RUN_S", 0.05)


def test_the_tier_is_read_and_overwritten(tmp_path: Path) -> None:
    load = SsdLoad(tmp_path / "ssd", BLOCK_BYTES, 2 * DEPTH, Memory(DEPTH * BLOCK_BYTES))
    before = load.tier.stats()
    assert before.room.blocks == 2 * DEPTH and before.room.evicted_blocks_total == 0
    assert load.read() > 0 and load.write() > 0
    with busy_thread():
        assert load.read() > 0
    after = load.tier.stats()
    assert after.io.read_bytes_total > 0 and after.io.read_errors_total == 0
    assert after.room.evicted_blocks_total > 0
    load.tier.close()


def test_a_block_that_fails_ends_the_measurement(tmp_path: Path) -> None:
    load = SsdLoad(tmp_path / "ssd", BLOCK_BYTES, 2 * DEPTH, Memory(DEPTH * BLOCK_BYTES))
    for slab in (tmp_path / "ssd").glob("*.slab"):
        slab.write_bytes(bytes(slab.stat().st_size))
    with pytest.raises(LoadFailed):
        load.read()
    load.tier.close()


def test_the_raw_file_is_read_and_written(tmp_path: Path) -> None:
    raw = RawFile(tmp_path / "raw", 8 << 20, Memory(4 << 20))
    assert raw.read(BLOCK_BYTES, 4) > 0 and raw.write(BLOCK_BYTES, 4) > 0
    raw.close()


def test_the_index_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_index, "BLOCKS", 64 * 50)
    monkeypatch.setattr(store_index, "LOOKUPS", 100)
    monkeypatch.setattr(store_index, "LOST_BLOCKS", 256)
    figures = store_index.measure_index(tmp_path / "million")
    figures |= store_index.measure_lost_tables(tmp_path / "lost")
    assert 0 < figures["lookup_p50_ms"] <= figures["lookup_p99_ms"]
    assert figures["restart_s"] > 0 and figures["restart_from_headers_blocks_per_s"] > 0


def test_hit_rates_are_those_of_the_rules() -> None:
    a, b, c = (BlockKey(bytes([i]) * 32) for i in range(1, 4))
    prompts = [[a, b], [c], [a, b], [a, b]]
    assert store_eviction.lru_hits(prompts, 2) == 2 and store_eviction.lru_hits(prompts, 3) == 4
    assert store_eviction.belady_hits(prompts, 2) == 4
    assert store_eviction.leaf_first_hits(prompts, 3) == 4
    assert store_eviction.leaf_first_hits(prompts, 2) == 3, "a leaf went, its parent stayed"
    cut = store_eviction.measure_eviction(replay.DEFAULT_TRACE)
    for rates in cut.values():
        assert rates["LRU"] <= rates["leaf first"] + 0.5 and rates["leaf first"] <= rates["Belady"]


def test_goals_compare_with_the_best_raw_reader() -> None:
    rates = {
        "1 MiB": {
            "read": 1.8e9,
            "raw read, 4 threads": 1.0e9,
            "raw read, 16 threads": 2.0e9,
            "SGLang file backend read": 1.0e9,
            "read beside a busy thread": 0.9e9,
            "write": 9e8,
            "raw write": 1e9,
            "write amplification": 1.01,
        }
    }
    goals = {
        g.name: g
        for g in goals_of(
            rates,
            {
                "lookup_p99_ms": 1.5,
                "restart_s": 11.0,
                "remote": {},
                "hit_rate_percent": {"5 %": {"leaf first": 20.4, "LRU": 19.5, "Belady": 36.6}},
            },
        )
    }
    assert goals["ssd read 1 MiB / best raw reader"].value == pytest.approx(0.9)
    holds = {name for name, goal in goals.items() if goal.holds}
    assert holds == {
        "ssd read 1 MiB / best raw reader",
        "ssd write 1 MiB / raw write",
        "write amplification",
        "look-up of 2,000 keys among 1M, p99",
        "hit rate under LRU's at 5 % of the working set",
        "hit rate above LRU's at 5 % of the working set",
    }
    assert goals["remote read / best raw client"].value is None
