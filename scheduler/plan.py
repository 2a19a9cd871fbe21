"""What is asked of the scheduler, what it decided, and its one refusal."""

from __future__ import annotations

import msgspec

from common.block import BlockKey, TierName
from common.experiment import NO_EXPERIMENT, Experiment
from common.ids import PlanId


class NoEngine(Exception):
    """No engine can take the request now.

    ``transient``: engines are alive but full, so it is worth waiting for one to finish.
    """

    def __init__(self, role: str, reason: str, transient: bool = False) -> None:
        super().__init__(f"no {role} engine for this request: {reason}")
        self.role = role
        self.reason = reason
        self.transient = transient


class PlanRequest(msgspec.Struct, frozen=True):
    """One request, tokenised and hashed."""

    rid: str
    """As the client knows it."""
    prompt_tokens: int
    keys: list[BlockKey]
    """Full blocks of the prompt, at most floor((prompt_tokens - 1) / page_tokens): the last
    token is always computed, as its logits are what the request wants."""
    max_new_tokens: int
    page_tokens: int
    block_bytes: int
    excluded: frozenset[str] = frozenset()
    """Engines that this request must not go to: of another namespace, or where it would not be
    alone."""
    avoided: frozenset[str] = frozenset()
    """Engines that it goes to only where there is no other."""
    use_cache: bool = True
    engine_rid: str = ""
    """As its engines are to know it."""


class Range(msgspec.Struct, frozen=True):
    """Consecutive hit blocks that one agent reads (or only keeps), all from one tier."""

    first: int
    blocks: int
    agent: str
    tier: TierName
    """Where the agent is expected to have them."""


class Plan(msgspec.Struct, frozen=True):
    """The decision for one request. Hit block i of the prompt is ``keys[i]``; ``ranges``
    cover the hit in prompt order."""

    id: PlanId
    rid: str
    prefill: str
    decode: str
    prefill_agent: str
    decode_agent: str
    keys: list[BlockKey]
    ranges: list[Range]
    block_bytes: int
    engine_rid: str = ""
    estimated_read_s: float = 0.0
    """Until the last block is in DRAM, as the scheduler sees it."""
    experiment: Experiment = NO_EXPERIMENT

    @property
    def agents(self) -> list[str]:
        """Readers, each once."""
        return list(dict.fromkeys(part.agent for part in self.ranges))

    @property
    def reader(self) -> list[int]:
        """Of each block, the index of its reader in ``agents``."""
        index = {agent: i for i, agent in enumerate(self.agents)}
        readers: list[int] = []
        for part in self.ranges:
            readers += [index[part.agent]] * part.blocks
        return readers

    def shares(self) -> dict[str, list[BlockKey]]:
        """Each reader's blocks, in prompt order."""
        shares: dict[str, list[BlockKey]] = {}
        for part in self.ranges:
            keys = self.keys[part.first : part.first + part.blocks]
            shares.setdefault(part.agent, []).extend(keys)
        return shares

    def read_bytes(self) -> dict[str, dict[TierName, int]]:
        """Bytes that each reader is expected to read from storage, by tier; none for DRAM."""
        read: dict[str, dict[TierName, int]] = {agent: {} for agent in self.agents}
        for part in self.ranges:
            if part.tier is not TierName.DRAM and not self.experiment.zero_io:
                by_tier = read[part.agent]
                by_tier[part.tier] = by_tier.get(part.tier, 0) + part.blocks * self.block_bytes
        return read

    def cut(self, hit_blocks: int) -> Plan:
        """The same plan for the first ``hit_blocks`` blocks. A reader may be left with none."""
        ranges = [
            msgspec.structs.replace(part, blocks=min(part.blocks, max(0, hit_blocks - part.first)))
            for part in self.ranges
        ]
        return msgspec.structs.replace(self, keys=self.keys[:hit_blocks], ranges=ranges)
