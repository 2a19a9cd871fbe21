"""What the agent does for a plan, as spans of the request that the plan is for."""

from __future__ import annotations

import time

from common.ids import PlanId
from common.messages.from_gateway import ReadShare
from common.tracing.spans import NO_SPAN, OK, Attributes, Span, Tracer
from storage.store_events import ShareSettled


class PlanSpans:
    """Spans are noted once they are over. Lives in the agent's loop."""

    def __init__(self, tracer: Tracer, agent: str) -> None:
        self._tracer = tracer
        self._agent = agent
        self._of_plans: dict[PlanId, Span] = {}
        """Of plans that have a share here, and a trace."""

    def begin(self, message: ReadShare) -> None:
        """A share has come; until it is forgotten, what is done for its plan belongs to it."""
        span = self._tracer.follow(message.traceparent) if message.traceparent else NO_SPAN
        if span is not NO_SPAN:
            self._of_plans[message.plan] = span

    def forget(self, plan: PlanId) -> None:
        self._of_plans.pop(plan, None)

    def of(self, plan: PlanId) -> Span:
        return self._of_plans.get(plan, NO_SPAN)

    def read(self, event: ShareSettled) -> None:
        """A share has all that it can get."""
        span = self.of(event.plan)
        if span is NO_SPAN:
            return
        blocks, in_dram = len(event.in_dram), sum(event.in_dram)
        missing = blocks - in_dram
        span.note(
            "read share",
            time.monotonic() - event.queue_s - event.read_s,
            {
                "agent": self._agent,
                "plan": event.plan,
                "blocks": blocks,
                "missing_blocks": missing,
                "bytes": sum(event.read_bytes.values()),
                "tier": [tier.value for tier in event.read_bytes] or ["dram"],
                **{f"bytes.{tier.value}": n for tier, n in event.read_bytes.items()},
                "slots_wait_s": event.queue_s,
                "outcome": "incomplete" if missing else OK,
            },
        )

    def delivered(self, span: Span, begun_s: float, outcome: str, told: Attributes) -> None:
        """A delivery has ended; ``span``: of its plan when it began."""
        if span is not NO_SPAN:
            attributes = {**told, "agent": self._agent, "outcome": outcome}
            span.note("deliver", begun_s, attributes, "" if outcome == OK else outcome)
