"""What the last requests leave behind for operators to see."""

from __future__ import annotations

import time
from collections import deque
from typing import TypedDict

from common.ids import PlanId
from launch.gateway.request.parts import Part
from launch.gateway.request.trace import Trace

KEPT = 32
"""Ended requests that ``/admin/cluster`` shows."""


class Ended(TypedDict):
    """A part of a request that has ended."""

    rid: str
    outcome: str
    plan: PlanId
    prefill: str
    decode: str
    readers: dict[str, int]
    """Blocks by agent."""
    read_bytes: dict[str, dict[str, int]]
    """From storage, by agent and tier."""
    prompt_tokens: int
    hit_tokens: int
    attempts: int
    timings_s: dict[str, float]


class EndedView(Ended):
    """... so long ago."""

    age_s: float


class RecentRequests:
    """The last ``KEPT`` of them."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, Ended]] = deque(maxlen=KEPT)

    def note(self, part: Part, trace: Trace, hit_tokens: int, outcome: str) -> None:
        """A part of a request has ended."""
        ended: Ended = {
            "rid": part.rid,
            "outcome": outcome,
            "plan": trace.plan,
            "prefill": trace.prefill,
            "decode": trace.decode,
            "readers": {agent: reader.blocks for agent, reader in trace.readers.items()},
            "read_bytes": {
                agent: {tier.value: n for tier, n in reader.read_bytes.items() if n}
                for agent, reader in trace.readers.items()
            },
            "prompt_tokens": len(part.token_ids or ()),
            "hit_tokens": hit_tokens,
            "attempts": trace.attempts,
            "timings_s": trace.timings_s,
        }
        self._recent.append((time.monotonic(), ended))

    def view(self) -> list[EndedView]:
        """The latest first."""
        now = time.monotonic()
        return [{**ended, "age_s": now - at} for at, ended in reversed(self._recent)]
