"""How loaded agents and engines are: their heartbeats, and what the scheduler decides by."""

from __future__ import annotations

import msgspec

from common.block import TierName
from common.ids import Incarnation
from common.prefill_cost import PrefillCost


class AgentLoad(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an agent has to read and to deliver, how fast it is, and what room it has."""

    agent: str
    incarnation: Incarnation
    read_queue_bytes: dict[TierName, int]
    """Promised to be read from SSD, and from remote over the storage NIC, and not read yet."""
    read_bytes_per_s: dict[TierName, float]
    """Measured while there was something to read (exponential average; 0: not measured)."""
    deliver_queue_bytes: int
    """Of accepted deliveries, not written yet: the queue of the compute NIC."""
    deliver_bytes_per_s: float
    """Measured while there was something to write; 0: not measured."""
    dram_slots: int
    dram_slots_free: int
    """Free or evictable now."""


class EngineLoad(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine has to do, and what room it has. Of engines that are scheduled as one,
    the leader reports."""

    engine: str
    role: str
    """"prefill" or "decode"."""
    agent: str
    """The agent of its node."""
    incarnation: Incarnation
    group: str
    """Engines that are scheduled as one (tensor or expert parallel)."""
    sequences: int
    """Running and waiting."""
    pending_tokens: int
    """Prompt tokens not yet prefilled."""
    context_tokens: int
    """Held by running and waiting sequences (the paper's ``tok``)."""
    free_tokens: int
    prefill_cost: PrefillCost | None = None
    """None until enough prefill forwards were measured, and of a decode engine."""
    linked: list[str] | None = None
    """Agents that it has a link to, so that they can deliver to it; None: all that there are."""


class ModelBounds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a request to an engine may name and fill. Beyond it SGLang's scheduler fails."""

    vocabulary_tokens: int
    context_tokens: int
    prompt_tokens_max: int
    """Of the context, and of the engine's KV pool."""
