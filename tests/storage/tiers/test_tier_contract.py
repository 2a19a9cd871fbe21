"""What every tier promises, whatever it is made of."""

from __future__ import annotations

import time
from collections.abc import Callable

from common.messages.from_agents import Holding
from storage.tiers.contract import BlockIO, BlockMissing, Tier
from storage.tiers.memory_tier import MemoryTier
from tests.storage.conftest import BLOCK_BYTES, finish, key_of, payload_of, read, settle, write


def test_a_written_block_reads_back(tier: Tier) -> None:
    key = key_of(1)
    assert write(tier, key)[key].error is None
    completion, data = read(tier, key)
    assert completion.error is None and not completion.is_write
    assert data == payload_of(key)


def test_many_blocks_at_once_land_in_their_own_buffers(tier: Tier) -> None:
    keys = [key_of(i) for i in range(40)]
    assert all(c.error is None for c in write(tier, *keys).values())
    buffers = {key: bytearray(BLOCK_BYTES) for key in keys}
    tier.submit_reads([BlockIO(key, memoryview(buffers[key])) for key in keys])
    assert all(c.error is None for c in finish(tier, len(keys)).values())
    assert buffers == {key: payload_of(key) for key in keys}


def test_an_absent_block_fails_alone(tier: Tier) -> None:
    here, absent = key_of(1), key_of(2)
    write(tier, here)
    buffers = [bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)]
    blocks = [BlockIO(k, memoryview(b)) for k, b in zip((here, absent), buffers, strict=True)]
    tier.submit_reads(blocks)
    completions = finish(tier, 2)
    assert completions[here].error is None and bytes(buffers[0]) == payload_of(here)
    assert isinstance(completions[absent].error, BlockMissing)
    assert tier.stats().io.missing_blocks_total == 1


def test_a_block_held_already_completes_at_once(tier: Tier) -> None:
    key = key_of(1)
    write(tier, key)
    written_bytes = tier.stats().io.write_bytes_total
    assert write(tier, key)[key].error is None
    assert tier.stats().io.write_bytes_total == written_bytes


def test_the_same_block_written_twice_at_once_is_stored_once(tier: Tier) -> None:
    key = key_of(1)
    payload = memoryview(payload_of(key))
    tier.submit_writes([BlockIO(key, payload), BlockIO(key, payload), BlockIO(key, payload)])
    completions = []
    end = time.monotonic() + 20
    while len(completions) < 3 and time.monotonic() < end:
        completions += tier.poll()
        time.sleep(0.001)
    assert [c.error for c in completions] == [None] * 3
    assert tier.stats().io.write_bytes_total == BLOCK_BYTES


def test_holdings_are_announced_once_they_are_durable(tier: Tier) -> None:
    keys = [key_of(1), key_of(2)]
    assert tier.take_changes() == [] and tier.keys() == []
    write(tier, *keys)
    assert sorted(c.key for c in tier.take_changes()) == sorted(keys)
    assert sorted(tier.keys()) == sorted(keys)
    assert tier.contains([keys[0], key_of(3), keys[1]]) == [True, False, True]
    assert tier.take_changes() == []


def test_another_process_finds_the_blocks(open_tier: Callable[[], Tier]) -> None:
    first = open_tier()
    if isinstance(first, MemoryTier):
        return  # keeps nothing, by intent
    key = key_of(1)
    write(first, key)
    first.close()
    second = open_tier()
    try:
        settle(second, lambda: second.contains([key]) == [True])
        assert read(second, key)[1] == payload_of(key)
    finally:
        second.close()


def test_queues_and_sizes_are_counted(tier: Tier) -> None:
    key = key_of(1)
    write(tier, key)
    read(tier, key)
    stats, room = tier.stats().io, tier.stats().room
    assert stats.read_queue_bytes == 0 and stats.write_queue_bytes == 0
    assert stats.read_bytes_total == BLOCK_BYTES and stats.write_bytes_total == BLOCK_BYTES
    assert room.blocks == 1 and room.used_bytes >= BLOCK_BYTES
    assert stats.read_errors_total == stats.write_errors_total == 0


def test_a_block_of_another_size_is_never_delivered(tier: Tier) -> None:
    key = key_of(1)
    write(tier, key)
    buffer = bytearray(BLOCK_BYTES - 1)
    tier.submit_reads([BlockIO(key, memoryview(buffer))])
    assert finish(tier, 1)[key].error is not None
    assert Holding(key, tier.name, False) in tier.take_changes()


def test_a_lost_block_can_be_stored_again(tier: Tier) -> None:
    key = key_of(1)
    write(tier, key)
    tier.submit_reads([BlockIO(key, memoryview(bytearray(BLOCK_BYTES + 1)))])
    finish(tier, 1)
    assert tier.contains([key]) == [False]
    assert write(tier, key)[key].error is None
    assert read(tier, key)[1] == payload_of(key)


def test_close_ends_within_seconds_with_work_queued(open_tier: Callable[[], Tier]) -> None:
    tier = open_tier()
    keys = [key_of(i) for i in range(200)]
    tier.submit_writes([BlockIO(key, memoryview(payload_of(key))) for key in keys])
    start = time.monotonic()
    tier.close()
    assert time.monotonic() - start < 5
