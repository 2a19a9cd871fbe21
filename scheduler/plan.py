"""What is asked of the scheduler, what it decided, and its one refusal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from common.block import BlockKey, Part, TierName, part_key
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
    parts: tuple[Part, ...] = ()
    """Of the model's state: a hit has them, or it is shorter."""


class Range(msgspec.Struct, frozen=True):
    """Consecutive hit blocks that one agent reads (or only keeps), all from one tier."""

    first: int
    blocks: int
    agent: str
    tier: TierName
    """Where the agent is expected to have them."""


def clipped(ranges: Sequence[Range], first: int, end: int) -> list[Range]:
    """What of the ranges is from block ``first`` to block ``end``; one may be left with none."""
    return [
        msgspec.structs.replace(part, first=start, blocks=max(0, stop - start))
        for part in ranges
        for start, stop in [(max(part.first, first), min(part.first + part.blocks, end))]
    ]


class PartReads(msgspec.Struct, frozen=True):
    """Who reads the objects of one part, by the blocks that they belong to."""

    name: str
    span_pages: int
    item_bytes: int
    ranges: list[Range]

    @property
    def blocks(self) -> list[int]:
        """In prompt order."""
        return [b for each in self.ranges for b in range(each.first, each.first + each.blocks)]


class Item(NamedTuple):
    """A block of a hit, or a block's object of a part."""

    part: str
    """Empty: the block itself."""
    block: int


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
    parts: list[PartReads] = []
    """Of each part of the model's state, in the order of the namespace, what the hit needs."""
    held_blocks: int = 0
    """Leading blocks that the cluster has; the hit may be shorter for want of ..."""
    lacking: str = ""
    """... this part."""

    @property
    def agents(self) -> list[str]:
        """Readers, each once."""
        every = (self.ranges, *(part.ranges for part in self.parts))
        return list(dict.fromkeys(each.agent for ranges in every for each in ranges))

    @property
    def reader(self) -> list[int]:
        """Of each block, the index of its reader in ``agents``."""
        return self._readers(self.ranges)

    @property
    def part_readers(self) -> list[list[int]]:
        """Likewise of the objects of each part that the hit needs."""
        return [self._readers(part.ranges) for part in self.parts]

    def _readers(self, ranges: Sequence[Range]) -> list[int]:
        index = {agent: i for i, agent in enumerate(self.agents)}
        readers: list[int] = []
        for part in ranges:
            readers += [index[part.agent]] * part.blocks
        return readers

    def shares(self) -> dict[str, list[BlockKey]]:
        """What each reader reads: blocks, in prompt order, and then objects of each part."""
        shares: dict[str, list[BlockKey]] = {}
        for part in self.ranges:
            keys = self.keys[part.first : part.first + part.blocks]
            shares.setdefault(part.agent, []).extend(keys)
        for reads in self.parts:
            for part in reads.ranges:
                keys = self.keys[part.first : part.first + part.blocks]
                share = shares.setdefault(part.agent, [])
                share.extend(part_key(reads.name, key) for key in keys)
        return shares

    def share_sizes(self, agent: str) -> list[int]:
        """Bytes of each object of a share, in its order; empty where there are only blocks."""
        if not self.parts:
            return []
        bytes_of = {part.name: part.item_bytes for part in self.parts}
        return [bytes_of.get(item.part, self.block_bytes) for item in self.items(agent)]

    def share_items(self, agent: str) -> int:
        """How many objects a reader's share has."""
        every = (self.ranges, *(part.ranges for part in self.parts))
        return sum(each.blocks for ranges in every for each in ranges if each.agent == agent)

    def items(self, agent: str) -> list[Item]:
        """What a reader's share consists of, in its order."""
        every = [("", self.ranges), *((part.name, part.ranges) for part in self.parts)]
        return [
            Item(name, block)
            for name, ranges in every
            for each in ranges
            if each.agent == agent
            for block in range(each.first, each.first + each.blocks)
        ]

    def key_of(self, item: Item) -> BlockKey:
        """Of a block, or of its object of a part."""
        key = self.keys[item.block]
        return part_key(item.part, key) if item.part else key

    def read_bytes(self) -> dict[str, dict[TierName, int]]:
        """Bytes that each reader is expected to read from storage, by tier; none for DRAM."""
        read: dict[str, dict[TierName, int]] = {agent: {} for agent in self.agents}
        every = [(self.block_bytes, self.ranges)]
        every += [(part.item_bytes, part.ranges) for part in self.parts]
        for item_bytes, ranges in every:
            for each in ranges:
                if each.tier is not TierName.DRAM and not self.experiment.zero_io:
                    by_tier = read[each.agent]
                    by_tier[each.tier] = by_tier.get(each.tier, 0) + each.blocks * item_bytes
        return read

    def cut(self, hit_blocks: int) -> Plan:
        """The same plan for the first ``hit_blocks`` blocks, which have all of their parts. A
        reader may be left with none."""
        parts = [
            msgspec.structs.replace(
                part,
                ranges=clipped(part.ranges, max(0, hit_blocks - part.span_pages), hit_blocks),
            )
            for part in self.parts
        ]
        ranges = clipped(self.ranges, 0, hit_blocks)
        return msgspec.structs.replace(
            self, keys=self.keys[:hit_blocks], ranges=ranges, parts=parts
        )
