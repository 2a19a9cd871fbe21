"""A scheduler of a cluster as the paper has them, with reports made up here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from common.block import KEY_BYTES, BlockKey, TierName
from common.ids import Incarnation
from common.loads import AgentLoad, EngineLoad
from common.prefill_cost import PrefillCost
from launch.cluster.layout import PAGE_TOKENS
from scheduler.directory.directory import Directory, Run
from scheduler.directory.holder_sets import Holders
from scheduler.options import SchedulerOptions
from scheduler.plan import PlanRequest, Range
from scheduler.scheduler import Scheduler

PAPER = (48, 96)
"""Prefill and decode nodes of the paper's largest cluster."""
THOUSAND = (333, 667)


class Hardware(msgspec.Struct, frozen=True):
    """One node with one engine: 8 GPUs, each with a NIC of 400 Gbit/s, and one such NIC for
    storage (DualPath, arXiv 2602.21548, section 7.1); Qwen2.5-32B in two-byte numbers."""

    storage_bytes_per_s: float = 50e9
    compute_bytes_per_s: float = 400e9
    prefill_tokens_per_s: float = 40_000.0
    """65 GFLOP a token at 40 % of 8 x 0.8 PFLOP/s."""
    block_bytes: int = PAGE_TOKENS * 64 * 8 * 128 * 2 * 2
    """64 layers, 8 heads of 128 numbers, keys and values."""
    kv_tokens: int = 4_000_000
    """More than comes together here: the size of the pool is not what is measured."""
    dram_slots: int = 19_000
    """320 GB, the paper's figure for a Qwen model."""

    @property
    def cost(self) -> PrefillCost:
        return PrefillCost(0.0, 1 / self.prefill_tokens_per_s, 0.0)


class RemoteStore(Directory):
    """A directory for which every block is in the remote store, and nothing anywhere else."""

    def lookup(self, keys: Sequence[BlockKey], agents: frozenset[str]) -> list[Run]:
        return [Run(0, len(keys), Holders(remote=True))] if keys else []

    def expect(self, agent: str, keys: Sequence[BlockKey], in_dram: bool) -> None:
        pass

    def expect_read(self, keys: Sequence[BlockKey], ranges: Iterable[Range]) -> None:
        pass


class Cluster:
    """``prefill`` + ``decode`` nodes, each with an agent and one engine, all of them idle."""

    def __init__(
        self,
        policy: str,
        prefill: int,
        decode: int,
        options: SchedulerOptions | None = None,
        hardware: Hardware | None = None,
    ) -> None:
        self.hardware = hardware or Hardware()
        self.scheduler = Scheduler(policy, options)
        self.engines = [f"p{i}" for i in range(prefill)] + [f"d{i}" for i in range(decode)]
        self.agents = [f"agent-{name}" for name in self.engines]
        for row in range(len(self.engines)):
            self.report_engine(row, 0.0)
            self.report_agent(row, 0.0)

    def report_engine(
        self,
        row: int,
        now: float,
        sequences: int = 0,
        pending_tokens: int = 0,
        context_tokens: int = 0,
    ) -> None:
        name, prefill = self.engines[row], self.engines[row].startswith("p")
        load = EngineLoad(
            engine=name,
            role="prefill" if prefill else "decode",
            agent=self.agents[row],
            incarnation=Incarnation(1),
            group="",
            sequences=sequences,
            pending_tokens=pending_tokens,
            context_tokens=context_tokens,
            free_tokens=self.hardware.kv_tokens - context_tokens,
            prefill_cost=self.hardware.cost if prefill else None,
        )
        self.scheduler.report(load, now)

    def report_agent(
        self,
        row: int,
        now: float,
        read_queue_bytes: float = 0.0,
        read_bytes_per_s: float | None = None,
        deliver_queue_bytes: float = 0.0,
    ) -> None:
        rate = read_bytes_per_s or self.hardware.storage_bytes_per_s
        load = AgentLoad(
            agent=self.agents[row],
            incarnation=Incarnation(1),
            read_queue_bytes={TierName.REMOTE: int(read_queue_bytes)},
            read_bytes_per_s={TierName.REMOTE: rate},
            deliver_queue_bytes=int(deliver_queue_bytes),
            deliver_bytes_per_s=self.hardware.compute_bytes_per_s,
            dram_slots=self.hardware.dram_slots,
            dram_slots_free=self.hardware.dram_slots,
        )
        self.scheduler.report(load, now)

    def request(
        self, rid: str, keys: list[BlockKey], prompt_tokens: int, max_new_tokens: int
    ) -> PlanRequest:
        return PlanRequest(
            rid=rid,
            prompt_tokens=prompt_tokens,
            keys=keys,
            max_new_tokens=max_new_tokens,
            page_tokens=PAGE_TOKENS,
            block_bytes=self.hardware.block_bytes,
        )


def some_keys(count: int) -> list[BlockKey]:
    """Keys for where only their number matters."""
    return [BlockKey(n.to_bytes(KEY_BYTES, "big")) for n in range(count)]
