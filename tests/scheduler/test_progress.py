"""Nobody waits for ever: neither for an engine nor, once planned, for DRAM at the readers."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from common.block import BlockKey, TierName
from common.ids import Incarnation
from common.messages.from_agents import Holding
from common.prefill_cost import PrefillCost
from scheduler.plan import NoEngine, Plan
from scheduler.policies import POLICY_NAMES
from scheduler.scheduler import Scheduler
from storage.block_format import encode_header
from storage.slot_pool import SlotPool
from storage.store_events import ShareSettled
from storage.store_options import StoreOptions
from storage.tiered_store import TieredStore
from storage.tiers.memory_tier import MemoryTier
from tests.examples import examples
from tests.scheduler.clusters import cluster, report_agent, report_engine, request

# ---- the global queue ---------------------------------------------------------------------

arrivals = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(0, 60)),
        st.tuples(st.just("finish"), st.integers(0, 9)),
    ),
    max_size=60,
)


@examples(200)
@given(st.sampled_from(POLICY_NAMES), arrivals)
def test_requests_leave_the_global_queue_in_order_and_all_of_them(policy, script):
    """Under any order of arrivals, lengths and ends, on engines that are soon full. The queue
    is the gateway's: first in, first out, looked at again whenever a request ends."""
    scheduler = cluster(policy)
    cost = PrefillCost(0.0, 1e-3, 0.0)  # beta: 5,000 tokens
    for name in ("p0", "p1"):
        report_engine(scheduler, name, prefill_cost=cost)
    for name in ("d0", "d1"):
        report_engine(scheduler, name, free_tokens=6000)
    queue: deque[str] = deque()
    running: list[Plan] = []
    planned: list[str] = []
    sizes: dict[str, int] = {}

    def plan_waiting() -> None:
        while queue:
            try:
                plan = scheduler.plan(request(queue[0], blocks=sizes[queue[0]]), 0.0)
            except NoEngine as full:
                assert full.transient and running, "with nothing running anything fits"
                return
            planned.append(queue.popleft())
            running.append(plan)

    def finish(which: int) -> None:
        scheduler.finished(running.pop(which % len(running)).id, 0.0)
        plan_waiting()

    for action, value in script:
        if action == "arrive":
            rid = str(len(sizes))
            sizes[rid] = value
            queue.append(rid)
            plan_waiting()
        elif running:
            finish(value)
    while running:
        finish(-1)  # the youngest first: the worst for those that wait
    assert planned == list(sizes), "each once, first in first out"


# ---- DRAM at the readers ------------------------------------------------------------------

SLOTS, BLOCK_BYTES = 6, 64
AGENTS = ("agent-p0", "agent-d0", "agent-d1")


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(32, "big"))


class Readers:
    """Real stores with little DRAM; every block is in the remote store that they share."""

    def __init__(self, blocks: int) -> None:
        payload = bytes(BLOCK_BYTES)
        objects = {key(n): (encode_header(key(n), payload), payload) for n in range(blocks)}
        self.stores = {agent: self._store(objects) for agent in AGENTS}
        self.settled: dict[tuple[int, str], list[bool]] = {}

    @staticmethod
    def _store(objects: dict) -> TieredStore:
        pool = SlotPool(memoryview(bytearray(SLOTS * 4096)), BLOCK_BYTES)
        assert pool.num_slots == SLOTS
        ssd = MemoryTier(TierName.SSD, lambda: None, capacity_bytes=0)
        remote = MemoryTier(TierName.REMOTE, lambda: None, index_is_complete=False)
        remote.blocks.update(objects)
        return TieredStore(pool, ssd, remote, StoreOptions(write_queue_blocks=1, hold_s=1e9))

    def admit(self, plan: Plan) -> None:
        for agent, keys in plan.shares().items():
            self.stores[agent].admit(plan.id, keys, 1e9, 0.0)

    def poll(self, agent: str) -> None:
        for event in self.stores[agent].poll(0.0):
            if isinstance(event, ShareSettled):
                self.settled[event.plan, agent] = event.in_dram

    def has_all(self, plan: Plan) -> bool:
        shares = plan.shares()
        done = [self.settled.get((plan.id, agent)) for agent in shares]
        assert all(in_dram is None or all(in_dram) for in_dram in done)
        return None not in done

    def release(self, plan: Plan) -> None:
        for store in self.stores.values():
            store.release(plan.id)


def reading_cluster(policy: str, blocks: int) -> Scheduler:
    scheduler = cluster(policy, prefill=1, decode=2)
    for agent in AGENTS:
        report_agent(scheduler, agent, dram_slots=SLOTS)
    changes = [Holding(key(n), TierName.REMOTE, True) for n in range(blocks)]
    assert scheduler.announce(AGENTS[0], Incarnation(1), 0, True, changes)
    return scheduler


@examples(150)
@given(
    st.sampled_from(["prefill", "shorter-queue", "split", "n-way"]),
    st.lists(st.integers(1, 14), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 7), st.sampled_from(AGENTS)), max_size=30),
)
def test_the_oldest_plan_always_gets_its_blocks(policy, sizes, script):
    """Each reader has DRAM for hardly one plan, and a plan keeps what it has at one reader while
    it waits for the others. Readers work in any order, plans end in any order."""
    scheduler, readers = reading_cluster(policy, sum(sizes)), Readers(sum(sizes))
    open_plans: list[Plan] = []
    for rid, blocks in enumerate(sizes):
        keys = [key(n) for n in range(sum(sizes[:rid]), sum(sizes[: rid + 1]))]
        plan = scheduler.plan(request(str(rid), blocks=blocks, keys=keys), 0.0)
        readers.admit(plan)
        open_plans.append(plan)
    for which, agent in script:
        readers.poll(agent)
        if which < len(open_plans) and readers.has_all(open_plans[which]):
            readers.release(open_plans.pop(which))
    while open_plans:
        for agent in 2 * AGENTS:
            readers.poll(agent)
        oldest = open_plans.pop(0)
        assert readers.has_all(oldest)
        readers.release(oldest)
