"""What became of one request: response header ``x-dualpath-trace`` and a log line."""

from __future__ import annotations

import logging
import time

import msgspec

from common.block import TierName
from common.ids import NO_PLAN, PlanId
from common.messages.from_agents import Delivered, ShareRead
from scheduler.plan import Plan

HEADER = "x-dualpath-trace"
log = logging.getLogger("dualpath.trace")


class ReaderTrace(msgspec.Struct):
    """One reader agent's part."""

    blocks: int
    read_bytes: dict[TierName, int]
    """Read from storage for this request; DRAM hits read nothing."""


class Trace(msgspec.Struct):
    """The last attempt at a request, as far as it got. Times are seconds."""

    plan: PlanId = NO_PLAN
    prefill: str = ""
    decode: str = ""
    hit_blocks: int = 0
    recomputed_tokens: int = 0
    lacking: dict[str, int] = {}
    """Blocks that the cluster has, and that are no hit for want of a part's objects, by part."""
    attempts: int = 0
    readers: dict[str, ReaderTrace] = {}
    delivered_bytes: dict[str, int] = {}
    """Written into each engine's KV memory, by all agents together."""
    timings_s: dict[str, float] = {}
    """tokenize; queue (for an engine); slots (longest wait for DRAM) and read (until all
    shares were settled); plan (accepted by both engines); deliver (the longest delivery); prefill
    (P's answer) and first_byte (D's), both since the request was posted; total."""
    estimates_s: dict[str, float] = {}
    """What the scheduler expected, from the plan on: ``read`` as above; ``first_token``, where
    it weighed loading against computing."""

    def planned(self, plan: Plan, first_token_s: float) -> None:
        """Begin an attempt with this plan; ``first_token_s``: when that is expected, or 0."""
        self.plan, self.prefill, self.decode = plan.id, plan.prefill, plan.decode
        self.readers, self.delivered_bytes = {}, {}
        lost_blocks = plan.held_blocks - len(plan.keys)
        self.lacking = {plan.lacking: lost_blocks} if plan.lacking else {}
        estimates_s = {"read": plan.estimated_read_s, "first_token": first_token_s}
        self.estimates_s = {k: round(v, 6) for k, v in estimates_s.items() if v}
        self.timings_s = {k: v for k, v in self.timings_s.items() if k in ("tokenize", "queue")}

    def read(
        self,
        plan: Plan,
        shares: dict[str, ShareRead | None],
        prompt_tokens: int,
        page_tokens: int,
    ) -> None:
        """``plan`` is cut to what is in DRAM by now."""
        self.hit_blocks = len(plan.keys)
        self.recomputed_tokens = prompt_tokens - len(plan.keys) * page_tokens
        blocks = plan.shares()
        for agent, share in shares.items():
            read_bytes = share.read_bytes if share is not None else {}
            self.readers[agent] = ReaderTrace(len(blocks[agent]), read_bytes)
        settled = [share.queue_s for share in shares.values() if share is not None]
        self.timings_s["slots"] = round(max(settled, default=0.0), 6)

    def delivered(self, news: Delivered) -> None:
        """An agent has written its share into an engine."""
        before_bytes = self.delivered_bytes.get(news.engine, 0)
        self.delivered_bytes[news.engine] = before_bytes + news.sent_bytes
        longest_s = max(self.timings_s.get("deliver", 0.0), news.seconds)
        self.timings_s["deliver"] = round(longest_s, 6)

    def clock(self, name: str, since_s: float) -> float:
        """Note the time since ``since_s`` (monotonic); returns now."""
        now = time.monotonic()
        self.timings_s[name] = round(now - since_s, 6)
        return now

    def header(self, parts: int) -> dict[str, str]:
        """Of a request that was fanned out, the trace of its first part and their number."""
        fields = msgspec.to_builtins(self)
        if parts > 1:
            fields["parts"] = parts
        return {HEADER: msgspec.json.encode(fields).decode()}

    def log(self, rid: str, outcome: str) -> None:
        log.debug("rid=%s outcome=%s trace=%s", rid, outcome, msgspec.json.encode(self).decode())
