"""Any order of plans, pulls, faults and delays leaves the store right and its slots free."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.block import BlockKey, TierName
from common.ids import PlanId
from common.messages.from_agents import Holding
from storage.block_format import HEADER_BYTES, encode_header
from storage.slot_pool import SlotPool
from storage.store_events import ShareSettled
from storage.store_options import StoreOptions
from storage.tiered_store import TieredStore
from storage.tiers.contract import BlockIO, Completion
from storage.tiers.faulty_tier import FaultyTier
from storage.tiers.memory_tier import MemoryTier
from tests.examples import examples
from tests.storage.conftest import key_of, no_wake, payload_of

SLOTS, NBYTES, HOLD_S = 5, 300, 30.0
KEYS = [key_of(i) for i in range(9)]
PAYLOADS = {key: payload_of(key, NBYTES) for key in KEYS}


class WatchedTier(FaultyTier):
    """Fails the test when a block is read twice at once, or while it is in DRAM."""

    store: TieredStore
    reading: set[BlockKey]  # of all tiers of the store

    def submit_reads(self, blocks: Sequence[BlockIO]) -> None:
        for block in blocks:
            assert block.key not in self.reading, "read twice at once"
            assert block.key not in self.store.pool.resident, "read though in DRAM"
            self.reading.add(block.key)
        super().submit_reads(blocks)

    def poll(self) -> list[Completion]:
        completions = super().poll()
        for completion in completions:
            if not completion.is_write:
                self.reading.remove(completion.key)
        return completions


class TieredStoreMachine(RuleBasedStateMachine):
    keep_in_dram = True

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.memory = bytearray(SLOTS * 4096)
        self.pool = SlotPool(memoryview(self.memory), NBYTES)
        self.uploaded = {key: (encode_header(key, p), p) for key, p in PAYLOADS.items()}
        remote = MemoryTier(TierName.REMOTE, no_wake, index_is_complete=False)
        ssd = MemoryTier(TierName.SSD, no_wake, capacity_bytes=4 * (HEADER_BYTES + NBYTES))
        self.remote_blocks = remote.blocks
        self.tiers = [WatchedTier(tier, 1, lambda: self.now) for tier in (ssd, remote)]
        self.store = TieredStore(
            self.pool,
            self.tiers[0],
            self.tiers[1],
            StoreOptions(write_queue_blocks=3, hold_s=HOLD_S, keep_in_dram=self.keep_in_dram),
        )
        reading: set[BlockKey] = set()
        for tier in self.tiers:
            tier.store, tier.reading = self.store, reading
        self.plans = 0
        self.wanted: dict[int, list[BlockKey]] = {}
        self.deadlines: dict[int, float] = {}
        self.order: list[int] = []  # admitted and neither settled nor released
        self.pinned: dict[int, list[BlockKey]] = {}
        self.held_until: dict[int, float] = {}
        self.reserved: set[BlockKey] = set()
        self.announced: set[tuple[BlockKey, TierName]] = set()

    # ---- what may happen --------------------------------------------------------------

    @rule(keys=st.lists(st.sampled_from(KEYS), unique=True, max_size=8), timeout=st.floats(0, 20))
    def admit(self, keys: list[BlockKey], timeout: float) -> None:
        self.plans += 1
        self.wanted[self.plans] = keys
        self.deadlines[self.plans] = self.now + timeout
        self.order.append(self.plans)
        self.store.admit(PlanId(self.plans), keys, self.deadlines[self.plans], self.now)

    @precondition(lambda self: self.plans)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        plan = data.draw(st.integers(1, self.plans))
        self.store.release(PlanId(plan))
        self.pinned.pop(plan, None)
        self.order = [p for p in self.order if p != plan]

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=4))
    def reserve(self, keys: list[BlockKey]) -> None:
        offsets = self.store.reserve(keys)
        assert not self.reserved & offsets.keys()
        for offset in offsets.values():
            self.memory[offset : offset + NBYTES] = b"?" * NBYTES
        self.reserved |= offsets.keys()

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), arrives=st.booleans())
    def end_pull(self, data: st.DataObject, arrives: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.reserved)))
        self.reserved.remove(key)
        if arrives:
            offset = self.pool.offset(key)
            self.memory[offset : offset + NBYTES] = PAYLOADS[key]
            self.store.commit(key)
        else:
            self.store.abandon(key)

    @rule(key=st.sampled_from(KEYS))
    def another_agent_uploads(self, key: BlockKey) -> None:
        self.remote_blocks[key] = self.uploaded[key]

    @rule(key=st.sampled_from(KEYS), at=st.integers(0, NBYTES - 1))
    def damage_remote(self, key: BlockKey, at: int) -> None:
        if key in self.remote_blocks:
            header, payload = self.remote_blocks[key]
            self.remote_blocks[key] = header, payload[:at] + b"\0\0" + payload[at + 2 :]

    @rule(tier=st.integers(0, 1), fault=st.sampled_from(["none", "stall", "fail", "slow"]))
    def set_fault(self, tier: int, fault: str) -> None:
        faulty = self.tiers[tier]
        faulty.stalled = fault == "stall"
        faulty.read_failure_rate = faulty.write_failure_rate = 0.5 * (fault == "fail")
        faulty.delay_s_max = 3.0 * (fault == "slow")

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 7.0]))
    def poll(self, seconds: float) -> None:
        self.now += seconds
        for event in self.store.poll(self.now):
            if isinstance(event, ShareSettled):
                self._settled(event)
            else:
                self._changed(event)
        for plan in [plan for plan, until in self.held_until.items() if self.now >= until]:
            self.pinned.pop(plan, None)
        assert all(self.deadlines[plan] > self.now for plan in self.order), "a deadline passed"
        if self.store.stats().waiting_plans:
            assert self.pinned or self.store.stats().persisting_blocks or self.tiers[0].reading, (
                "a plan waits though nothing is in its way"
            )

    # ---- what must hold ---------------------------------------------------------------

    def _settled(self, event: ShareSettled) -> None:
        assert event.plan in self.order, "settled twice, or after its release"
        self.order.remove(event.plan)
        keys = self.wanted[event.plan]
        assert len(event.in_dram) == len(keys)
        here = [key for key, in_dram in zip(keys, event.in_dram, strict=True) if in_dram]
        assert sum(event.read_bytes.values()) <= NBYTES * len(keys)
        self.pinned[event.plan] = here
        self.held_until[event.plan] = self.now + HOLD_S

    def _changed(self, event: Holding) -> None:
        entry = (event.key, event.tier)
        assert (entry in self.announced) != event.held, "announced twice"
        (self.announced.add if event.held else self.announced.discard)(entry)

    @invariant()
    def pinned_blocks_hold_their_bytes(self) -> None:
        for keys in self.pinned.values():
            for key in keys:
                offset = self.store.pool.offset(key)
                assert self.memory[offset : offset + NBYTES] == PAYLOADS[key]

    @invariant()
    def slots_add_up(self) -> None:
        stats = self.store.stats()
        pinned = {key for keys in self.pinned.values() for key in keys} | self.reserved
        assert stats.slots_available + len(pinned) <= SLOTS
        assert stats.persisting_blocks <= 3 + len(self.reserved)
        assert stats.waiting_plans + stats.reading_plans <= len(self.order)

    def teardown(self) -> None:
        """Once the faults end, every plan settles in turn, and nothing is left over."""
        for tier in (0, 1):
            self.set_fault(tier, "none")
        for key in sorted(self.reserved):
            self.store.abandon(key)
        self.reserved.clear()
        for plan in list(self.deadlines):
            self.deadlines[plan] = self.now + 1e9  # none is needed any more to make progress
        for _ in range(2 * len(self.order) + 5):
            self.poll(0.5)
            for plan in list(self.pinned):
                self.store.release(PlanId(plan))
                del self.pinned[plan]
        assert not self.order, "a plan never settled"
        self.poll(5.0)
        self.poll(0.0)
        stats = self.store.stats()
        assert stats.slots_available == SLOTS, "a slot leaked"
        assert stats.persisting_blocks == stats.pinning_plans == 0
        assert not any(stats.read_queue_bytes.values())
        assert self.announced == {(e.key, e.tier) for e in self.store.holdings()}
        for key in KEYS:
            if key in self.pool.resident:
                assert bytes(self.pool.buffer(key)) == PAYLOADS[key]
        self.store.close()


class InFlightOnlyMachine(TieredStoreMachine):
    keep_in_dram = False


TestTieredStore = TieredStoreMachine.TestCase
TestInFlightOnly = InFlightOnlyMachine.TestCase
TestTieredStore.settings = examples(80, stateful_step_count=40)
