"""Schedulers with a small cluster that has just reported."""

from __future__ import annotations

import msgspec

from common.block import BlockKey, TierName
from common.ids import Incarnation
from common.loads import AgentLoad, EngineLoad
from common.messages.from_agents import Holding
from scheduler.cluster_state import ClusterState
from scheduler.options import SchedulerOptions
from scheduler.plan import PlanRequest
from scheduler.scheduler import Scheduler

PAGE_TOKENS = 64
BLOCK_BYTES = 1000
EVERY_BLOCK = SchedulerOptions(range_min_blocks=1)


def keys_of(count: int) -> list[BlockKey]:
    return [BlockKey(n.to_bytes(32, "big")) for n in range(count)]


def request(rid: str = "r", blocks: int = 10, **changes) -> PlanRequest:
    asked = PlanRequest(
        rid=rid,
        prompt_tokens=blocks * PAGE_TOKENS + 1,
        keys=keys_of(blocks),
        max_new_tokens=16,
        page_tokens=PAGE_TOKENS,
        block_bytes=BLOCK_BYTES,
    )
    return msgspec.structs.replace(asked, **changes)


def report_engine(scheduler: Scheduler, name: str, now: float = 0.0, **changes) -> None:
    load = EngineLoad(
        engine=name,
        role="prefill" if name.startswith("p") else "decode",
        agent=f"agent-{name}",
        incarnation=Incarnation(1),
        group="",
        sequences=0,
        pending_tokens=0,
        context_tokens=0,
        free_tokens=100_000,
    )
    scheduler.report(msgspec.structs.replace(load, **changes), now)


def report_agent(scheduler: Scheduler, name: str, now: float = 0.0, **changes) -> None:
    load = AgentLoad(
        agent=name,
        incarnation=Incarnation(1),
        read_queue_bytes={},
        read_bytes_per_s={TierName.SSD: 1e6, TierName.REMOTE: 1e6},
        deliver_queue_bytes=0,
        deliver_bytes_per_s=1e7,
        dram_slots=1000,
        dram_slots_free=1000,
    )
    scheduler.report(msgspec.structs.replace(load, **changes), now)


def cluster(
    policy: str = "split",
    prefill: int = 2,
    decode: int = 2,
    options: SchedulerOptions | None = None,
) -> Scheduler:
    """Engines p0.. and d0.., each with an agent of its own; nothing stored yet."""
    scheduler = Scheduler(policy, options)
    for name in [f"p{i}" for i in range(prefill)] + [f"d{i}" for i in range(decode)]:
        report_engine(scheduler, name)
        report_agent(scheduler, f"agent-{name}")
    return scheduler


def hold(scheduler: Scheduler, agent: str, blocks: int, tier: TierName) -> None:
    changes = [Holding(key, tier, True) for key in keys_of(blocks)]
    assert scheduler.announce(agent, Incarnation(1), 0, True, changes)


def state_of(
    queues: dict[str, tuple[int, float]], options: SchedulerOptions = EVERY_BLOCK
) -> ClusterState:
    """Agents with (bytes queued at SSD and storage NIC each, bytes a second of each)."""
    scheduler = Scheduler("prefill", options)
    for name, (queue_bytes, rate) in queues.items():
        report_agent(
            scheduler,
            name,
            read_queue_bytes={TierName.SSD: queue_bytes, TierName.REMOTE: queue_bytes},
            read_bytes_per_s={TierName.SSD: rate, TierName.REMOTE: rate},
            deliver_bytes_per_s=1e9,
        )
    scheduler.state.look(0.0)
    return scheduler.state
