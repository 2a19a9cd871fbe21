"""What the paper's workload asks of a cluster, by its number of nodes."""

from __future__ import annotations

import msgspec

from benchmarks.scheduler.cluster import PAGE_TOKENS, Hardware
from benchmarks.scheduler.fluid import Workload

CONTEXT_TOKENS = 32_700
"""Mean of the 64K traces (arXiv 2602.21548, section 7.1): 157 turns."""
DECODE_PART = 2 / 3
"""Of all nodes: 48P96D."""
DECODE_BATCH = 256
STEP_S = 0.02


class Demand(msgspec.Struct, frozen=True):
    """Of ``nodes`` whose storage NICs bring all they can (the fluid model's limit)."""

    nodes: int

    @property
    def turns_per_s(self) -> float:
        hardware = Hardware()
        hit_bytes = self.hit_blocks * hardware.block_bytes
        return self.nodes * hardware.storage_bytes_per_s / hit_bytes

    @property
    def hit_blocks(self) -> int:
        """Of a turn."""
        return CONTEXT_TOKENS // PAGE_TOKENS

    @property
    def streamed_tokens_per_s(self) -> float:
        return self.turns_per_s * Workload(1.0).generated_tokens

    @property
    def new_blocks_per_s(self) -> float:
        """Filled at decode engines."""
        work = Workload(1.0)
        return self.turns_per_s * (work.append_tokens + work.generated_tokens) / PAGE_TOKENS

    @property
    def pulled_blocks_per_s(self) -> float:
        """By the agent of one decode node."""
        return self.new_blocks_per_s / (DECODE_PART * self.nodes)

    @property
    def deliveries_per_s(self) -> float:
        """By one agent, each of :attr:`hit_blocks`: into a prefill and a decode engine."""
        return 2 * self.turns_per_s / self.nodes

    @property
    def local_changes_per_s(self) -> float:
        """Announced to the gateway: hit blocks come to some DRAM and leave it again; new ones come
        to DRAM and SSD."""
        return self.turns_per_s * self.hit_blocks * 2 + self.new_blocks_per_s * 2

    @property
    def remote_changes_per_s(self) -> float:
        """Announced by every agent for every pack that it finds."""
        return self.new_blocks_per_s * self.nodes
