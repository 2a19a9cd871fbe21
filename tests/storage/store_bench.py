"""A store over faulty in-memory tiers, for tests that drive it step by step."""

from __future__ import annotations

from collections.abc import Sequence

from common.block import BlockKey, TierName
from common.ids import PlanId
from storage.block_format import HEADER_BYTES, encode_header
from storage.slot_pool import SlotPool
from storage.store_events import ShareSettled
from storage.store_options import StoreOptions
from storage.tiered_store import TieredStore
from storage.tiers.contract import BlockIO
from storage.tiers.faulty_tier import FaultyTier
from storage.tiers.memory_tier import MemoryTier
from tests.storage.conftest import key_of, no_wake, payload_of

NBYTES = 5000
DRAM, SSD, REMOTE = TierName.DRAM, TierName.SSD, TierName.REMOTE


class Bench:
    """A store over faulty in-memory tiers, a clock, and what happened."""

    def __init__(
        self, slots: int = 4, ssd_blocks: int = 100, remote: bool = True, **options: float | str
    ) -> None:
        self.now = 0.0
        self.memory = bytearray(slots * 8192)
        self.pool = SlotPool(memoryview(self.memory), NBYTES)
        capacity = ssd_blocks * (HEADER_BYTES + NBYTES)
        self.ssd_memory = MemoryTier(SSD, no_wake, capacity)
        self.remote_memory = MemoryTier(REMOTE, no_wake, index_is_complete=False)
        self.ssd = FaultyTier(self.ssd_memory, clock=lambda: self.now)
        self.remote = FaultyTier(self.remote_memory, clock=lambda: self.now)
        remote_tier = self.remote if remote else None
        self.store = TieredStore(self.pool, self.ssd, remote_tier, StoreOptions(**options))  # type: ignore[arg-type]
        self.settled: dict[int, ShareSettled] = {}
        self.changes: list[tuple[BlockKey, TierName, bool]] = []

    def on_ssd(self, *keys: BlockKey) -> None:
        for key in keys:
            self.ssd_memory.submit_writes([BlockIO(key, memoryview(payload_of(key, NBYTES)))])
        self.ssd_memory.poll()
        self.poll()

    def on_remote(self, *keys: BlockKey) -> None:
        """Uploaded by another agent: not in the index."""
        for key in keys:
            payload = payload_of(key, NBYTES)
            self.remote_memory.blocks[key] = encode_header(key, payload), payload

    def persist(self, *keys: BlockKey) -> None:
        for key in self.store.reserve(keys):
            offset = self.pool.offset(key)
            self.memory[offset : offset + NBYTES] = payload_of(key, NBYTES)
            self.store.commit(key)

    def admit(self, plan: int, keys: Sequence[BlockKey], timeout_s: float = 10.0) -> None:
        self.store.admit(PlanId(plan), list(keys), self.now + timeout_s, self.now)
        self.poll()

    def poll(self, seconds: float = 0.0, times: int = 4) -> None:
        self.now += seconds
        for _ in range(times):
            for event in self.store.poll(self.now):
                if isinstance(event, ShareSettled):
                    assert event.plan not in self.settled
                    self.settled[event.plan] = event
                else:
                    self.changes.append((event.key, event.tier, event.held))

    def check_bytes(self, key: BlockKey) -> None:
        offset = self.store.pool.offset(key)
        assert self.memory[offset : offset + NBYTES] == payload_of(key, NBYTES)


A, B, C, D, E, F = KEYS = [key_of(i) for i in range(6)]
