"""Objects of parts on a disk, beside the blocks that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from storage.ssd.slab import slot_bytes_for
from storage.ssd.tier import SsdTier
from storage.tiers.contract import BlockIO, EvictionCause
from tests.storage.conftest import finish, key_of, no_wake, payload_of


def test_objects_of_one_agent_make_way_for_each_other_one_by_one(
    tmp_path: Path, closing: Callable[[SsdTier], SsdTier]
) -> None:
    """A small one has a slot as large as the others', and its own bytes in it."""
    block, small = payload_of(key_of(0)), b"small" * 11
    tier = closing(SsdTier(tmp_path, 4 * slot_bytes_for(len(block)), no_wake))
    tier.share_slots(len(block))
    keys = [key_of(number) for number in range(8)]
    for key, payload in zip(keys, [block, small] * 4, strict=True):
        tier.submit_writes([BlockIO(key, memoryview(payload))])
        assert finish(tier, 1)[key].error is None
    assert tier.contains(keys) == [False] * 4 + [True] * 4
    assert tier.stats().room.evictions_total == {EvictionCause.CAPACITY: 4}
    assert len(list(tmp_path.rglob("*.slab"))) <= 4
    buffer = bytearray(len(small))
    tier.submit_reads([BlockIO(keys[7], memoryview(buffer))])
    assert finish(tier, 1)[keys[7]].error is None and bytes(buffer) == small
