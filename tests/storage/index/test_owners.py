"""Quotas and bulk drops: whose blocks go, at once and for good, and whose stay."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from common.block import BlockLabel, TierName, tenant_digest
from storage.block_format import HEADER_BYTES
from storage.index.held_blocks import HeldBlocks
from storage.index.owners import BadSelector, Quota, Selector
from storage.slot_pool import SlotPool
from storage.ssd import backend as ssd_backend
from storage.ssd import owner_numbers
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


def of_part(name: str) -> BlockLabel:
    return msgspec.structs.replace(label(ANN), part=name)


@pytest.mark.parametrize("tables", ["right", "lost"])
def test_snapshots_have_a_budget_also_after_a_start(tmp_path: Path, tables: str) -> None:
    """All parts of a state count together, whoever's they are; blocks and windows do not."""
    each = SLOT_BYTES
    quotas = [Quota.parse(f"part:state={4 * each}")]

    def started() -> SsdTier:
        return SsdTier(tmp_path, 40 * each, no_wake, threads=2, quotas=quotas)

    tier = started()
    try:
        write_as(tier, label(ANN), *range(10, 16))
        write_as(tier, of_part("window"), *range(20, 26))
        write_as(tier, of_part("state0"), 30, 31)
        write_as(tier, of_part("state1"), 40, 41, 42)
        assert held(tier) == {*range(10, 16), *range(20, 26), 31, 40, 41, 42}
        tier.close()
        if tables == "lost":
            lose_tables(tmp_path)
        tier = started()
        tier.touch([], [key_of(41)])
        write_as(tier, msgspec.structs.replace(label(BOB), part="state0"), 50, 51)
        assert held(tier) == {*range(10, 16), *range(20, 26), 40, 42, 50, 51}
    finally:
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
    used = {(o.weight_version, blocks) for o, blocks, _ in tier.owners.usage()}
    assert used == {("v1", 3), ("v2", 2)}


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
    assert {o.tenant: blocks for o, blocks, _ in tier.owners.usage()} == {
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


# ---- what is kept of owners does not grow with all who ever came ---------------------------


def salts(count: int) -> list[str]:
    return [f"salt of session {i}" for i in range(count)]


def test_a_group_is_forgotten_with_the_last_of_its_blocks() -> None:
    index = HeldBlocks(TierName.SSD, lambda place: 10, [Quota.parse("tenant:*=1GiB")])
    for number, salt in enumerate(salts(1000)):
        index.add(key_of(number), number, label(salt))
        if number >= 20:
            assert index.pop(key_of(number - 20)) == number - 20
        if number % 50 == 0:
            index.drop(Selector.parse(f"tenant:{salt}"))
        assert len(index.owners) <= 21 and index.index.group(key_of(number)) <= 21
    assert len(index.owners.usage()) == 20
    assert all(count == 1 and nbytes == 10 for _, count, nbytes in index.owners.usage())


def test_a_new_owner_is_not_taken_for_a_dropped_one() -> None:
    index = HeldBlocks(TierName.SSD, lambda place: 10)
    index.add(key_of(1), 1, label(ANN))
    index.drop(Selector.parse("tenant:*"))
    index.pop(key_of(1))
    index.add(key_of(2), 2, label(BOB))
    assert key_of(2) in index and not index.is_dropped(key_of(2))


def test_slots_know_the_owners_of_what_they_hold() -> None:
    pool = SlotPool(memoryview(bytearray(4 * BLOCK_BYTES)), BLOCK_BYTES)
    for number, salt in enumerate(salts(100)):
        pool.begin_fill(key_of(number))
        pool.commit(key_of(number), label(salt))
    assert len(pool.owners) == pool.num_slots
    assert pool.drop(Selector.parse("tenant:*")) and not len(pool.owners)


def test_a_refused_write_leaves_no_owner_behind() -> None:
    tier = MemoryTier(TierName.SSD, no_wake, quotas=[Quota.parse("tenant:*=100")])
    for number, salt in enumerate(salts(20)):
        assert write_as(tier, label(salt), number) == []
    assert tier.owners.usage() == [] and not len(tier.owners)


def test_the_notes_of_a_folder_have_the_owners_of_its_blocks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(owner_numbers, "OWNERS_MAX", 8)
    notes = FolderNotes(tmp_path)
    tier = SsdTier(tmp_path, 40 * SLOT_BYTES, no_wake, threads=2)
    for number, salt in enumerate(salts(100)):
        write_as(tier, label(salt), number)
        assert len(notes.owners()) <= 8
    last = held(tier)
    usage = {(owner.tenant, blocks) for owner, blocks, _ in tier.owners.usage()}
    tier.close()
    for _ in range(2):  # owners that were not noted any more are found by the headers
        tier = SsdTier(tmp_path, 40 * SLOT_BYTES, no_wake, threads=2)
        assert held(tier) >= last and len(notes.owners()) == len(held(tier))
        assert usage <= {(owner.tenant, blocks) for owner, blocks, _ in tier.owners.usage()}
        tier.close()


def test_drops_that_cover_nothing_leave_the_notes(tmp_path: Path) -> None:
    tier = SsdTier(tmp_path, 40 * SLOT_BYTES, no_wake, threads=2)
    write_as(tier, label(ANN, "v1"), 1, 2)
    for version in range(50):
        tier.drop(Selector.parse(f"version:v{version}"))
    tier.close()
    notes = FolderNotes(tmp_path)
    assert len(notes.drops()) == 50
    for _ in range(2):
        tier = SsdTier(tmp_path, 40 * SLOT_BYTES, no_wake, threads=2)
        assert held(tier) == set()
        tier.close()
        assert [str(drop.selector) for drop in notes.drops()] == ["version:v1"]


@pytest.mark.parametrize("text", ["", "tenant", "tenant:", "colour:red", "part:state"])
def test_what_selects_nothing_says_what_would(text: str) -> None:
    with pytest.raises(BadSelector, match="FIELD:VALUE"):
        Selector.parse(text)


@pytest.mark.parametrize("text", ["tenant:*", "tenant:*=", "tenant:*=much", "colour:red=1GiB"])
def test_what_is_no_quota_says_so(text: str) -> None:
    with pytest.raises(BadSelector, match="no quota"):
        Quota.parse(text)
