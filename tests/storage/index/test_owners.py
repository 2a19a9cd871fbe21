"""Quotas and bulk drops: whose blocks go, at once and for good, and whose stay."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from common.block import TierName, tenant_digest
from storage.block_format import HEADER_BYTES
from storage.index.owners import BadSelector, Quota, Selector
from storage.ssd import backend as ssd_backend
from storage.ssd.notes import FolderNotes
from storage.ssd.slab import slot_bytes_for
from storage.ssd.tier import SsdTier
from storage.tiers.contract import BlockIO, BlockMissing, EvictionCause, Tier, TierFull
from storage.tiers.memory_tier import MemoryTier
from tests.storage.conftest import BLOCK_BYTES, finish, key_of, no_wake, payload_of, read, settle
from tests.storage.owned_blocks import ANN, BOB, held, label, write_as
from tests.storage.ssd.slab_files import lose_tables

SLOT_BYTES = slot_bytes_for(BLOCK_BYTES)


def reclaimed(tier: Tier) -> None:
    settle(tier, lambda: tier.stats().room.blocks == len(tier.keys()))


@pytest.mark.parametrize("kind", ["memory", "ssd"])
def test_a_full_quota_takes_from_its_own_tenant(kind: str, tmp_path: Path) -> None:
    each = slot_bytes_for(BLOCK_BYTES) if kind == "ssd" else HEADER_BYTES + BLOCK_BYTES
    quotas = [Quota(Selector.parse("tenant:*"), 3 * each)]
    tier: Tier
    if kind == "ssd":
        tier = SsdTier(tmp_path, 40 * SLOT_BYTES, no_wake, threads=2, quotas=quotas)
    else:
        tier = MemoryTier(TierName.SSD, no_wake, 40 * each, quotas=quotas)
    write_as(tier, label(ANN), *range(3))
    write_as(tier, label(BOB), *range(10, 15))
    assert held(tier) == {0, 1, 2, 12, 13, 14}
    write_as(tier, label(ANN), 3)
    assert held(tier) == {1, 2, 3, 12, 13, 14}
    assert tier.stats().room.evictions_total == {EvictionCause.QUOTA: 3}
    tier.close()


def test_quotas_of_a_model_and_of_one_tenant_hold_together() -> None:
    each = HEADER_BYTES + BLOCK_BYTES
    quotas = [Quota.parse(f"version:v1={4 * each}"), Quota.parse(f"tenant:{ANN}={2 * each}")]
    tier = MemoryTier(TierName.SSD, no_wake, 40 * each, quotas=quotas)
    write_as(tier, label(ANN), *range(4))
    write_as(tier, label(BOB), *range(10, 13))
    assert held(tier) == {3, 10, 11, 12}
    write_as(tier, label(ANN, "v2"), 20, 21)
    assert held(tier) == {10, 11, 12, 20, 21}
    assert {(o.weight_version, blocks) for o, blocks, _ in tier.usage()} == {("v1", 3), ("v2", 2)}


def test_a_block_that_no_quota_has_room_for_is_refused() -> None:
    tier = MemoryTier(TierName.SSD, no_wake, quotas=[Quota(Selector.parse("tenant:*"), 100)])
    tier.submit_writes([BlockIO(key_of(1), memoryview(payload_of(key_of(1))), label(ANN))])
    assert isinstance(finish(tier, 1)[key_of(1)].error, TierFull)


def test_a_drop_is_seen_at_once_and_makes_room_later() -> None:
    tier = MemoryTier(TierName.SSD, no_wake)
    write_as(tier, label(ANN), *range(5))
    write_as(tier, label(BOB), *range(5, 9))
    tier.take_changes()
    tier.drop(Selector.parse(f"tenant:{ANN}"))
    assert held(tier) == {5, 6, 7, 8}
    assert isinstance(read(tier, key_of(0))[0].error, BlockMissing)
    assert write_as(tier, label(ANN), 0) == [key_of(0)]
    reclaimed(tier)
    assert held(tier) == {0, 5, 6, 7, 8} and len(tier.blocks) == 5
    assert read(tier, key_of(0))[1] == payload_of(key_of(0))
    lost = [change.key for change in tier.take_changes() if not change.held]
    assert sorted(lost) == sorted(key_of(i) for i in range(5))


def test_what_is_being_written_is_dropped_too(tmp_path: Path) -> None:
    tier = SsdTier(tmp_path, 40 * SLOT_BYTES, no_wake, threads=2)
    key = key_of(1)
    tier.submit_writes([BlockIO(key, memoryview(payload_of(key)), label(ANN))])
    tier.drop(Selector.parse("tenant:*"))
    assert finish(tier, 1)[key].error is None
    assert held(tier) == set() and tier.stats().room.used_bytes == 0
    tier.close()


def test_what_is_being_read_is_dropped_too(tmp_path: Path) -> None:
    tier = SsdTier(tmp_path, 40 * SLOT_BYTES, no_wake, threads=2)
    write_as(tier, label(ANN), 1)
    buffer = bytearray(BLOCK_BYTES)
    tier.submit_reads([BlockIO(key_of(1), memoryview(buffer))])
    tier.drop(Selector.parse("tenant:*"))
    assert finish(tier, 1)[key_of(1)].error is None and buffer == payload_of(key_of(1))
    assert held(tier) == set()
    reclaimed(tier)
    assert tier.stats().room.used_bytes == 0
    tier.close()


@pytest.mark.parametrize("tables", ["right", "lost"])
def test_what_was_dropped_stays_away_after_a_restart(tmp_path: Path, tables: str) -> None:
    tier = SsdTier(tmp_path, 40 * SLOT_BYTES, no_wake, threads=2)
    write_as(tier, label(ANN, "v1"), *range(4))
    write_as(tier, label(BOB, "v2"), *range(10, 14))
    tier.drop(Selector.parse("version:v1"))
    write_as(tier, label(ANN, "v1"), 20)
    assert held(tier) == {10, 11, 12, 13, 20}
    tier.close()
    if tables == "lost":
        lose_tables(tmp_path)
    tier = SsdTier(tmp_path, 40 * SLOT_BYTES, no_wake, threads=2)
    assert held(tier) == {10, 11, 12, 13, 20}
    assert {o.tenant: blocks for o, blocks, _ in tier.usage()} == {
        tenant_digest(BOB): 4,
        tenant_digest(ANN): 1,
    }
    tier.drop(Selector.parse("tenant:*"))
    reclaimed(tier)
    assert tier.stats().room.used_bytes == 0
    tier.close()


def test_another_process_may_ask_for_a_drop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssd_backend, "FOLDER_CHECK_S", 0.01)
    tier = SsdTier(tmp_path, 40 * SLOT_BYTES, no_wake, threads=2)
    write_as(tier, label(ANN), *range(4))
    write_as(tier, label(BOB), 5)
    request = FolderNotes(tmp_path).request_drop(Selector.parse(f"tenant:{ANN}"))
    end = time.monotonic() + 5
    while request.exists() and time.monotonic() < end:
        assert tier.poll() == []
    assert held(tier) == {5}
    assert tier.take_drops() == [Selector.parse(f"tenant:{ANN}")] and tier.take_drops() == []
    tier.close()


@pytest.mark.parametrize("text", ["", "tenant", "tenant:", "colour:red"])
def test_what_selects_nothing_says_what_would(text: str) -> None:
    with pytest.raises(BadSelector, match="FIELD:VALUE"):
        Selector.parse(text)


@pytest.mark.parametrize("text", ["tenant:*", "tenant:*=", "tenant:*=much", "colour:red=1GiB"])
def test_what_is_no_quota_says_so(text: str) -> None:
    with pytest.raises(BadSelector, match="no quota"):
        Quota.parse(text)
