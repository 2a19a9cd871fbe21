"""Why a plan is as it is: kept for a while, told on request."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypedDict

import msgspec
import numpy as np

from common.ids import PlanId
from common.json import JsonObject
from scheduler.cluster_state import ClusterState
from scheduler.load_policy import LoadEstimate
from scheduler.plan import Plan
from scheduler.rows.processes import Device, Floats, Mask


class CandidateView(TypedDict):
    """An engine that could have been chosen."""

    name: str
    pending_tokens: float
    context_tokens: float
    sequences: float


class ReaderView(TypedDict):
    """An agent that could be given reads, its numbers by device, and what it was given."""

    name: str
    backlog_s: dict[str, float]
    bytes_per_s: dict[str, float]
    read_bytes: int


class ChoiceView(TypedDict):
    """One engine of several."""

    chosen: str
    candidates: list[CandidateView]


class PlanView(TypedDict):
    """Why a plan is as it is."""

    plan: PlanId
    rid: str
    engine_rid: str
    policy: str
    age_s: float
    prompt_tokens: int
    prefill: ChoiceView
    decode: ChoiceView
    load: JsonObject | None
    hit_blocks: int
    held_blocks: int
    """Leading blocks that the cluster has; the hit is shorter where it was not worth its load,
    or for want of the objects of the part ..."""
    lacking: str
    """... of this name, at the end of those blocks; empty if none was wanting."""
    estimated_read_s: float
    agents: list[ReaderView]
    ranges: list[JsonObject]
    parts: list[JsonObject]


class Decision(msgspec.Struct, frozen=True):
    """Everything that a plan was made of, as it was before the plan's own promises."""

    plan: Plan
    policy: str
    decided_s: float
    prompt_tokens: int
    load: LoadEstimate | None
    engine_names: list[str]
    agent_names: list[str]
    usable_engines: Mask
    usable_agents: Mask
    is_prefill: Mask
    pending_tokens: Floats
    context_tokens: Floats
    sequences: Floats
    backlog_s: Floats
    bytes_per_s: Floats

    def view(self, now: float) -> PlanView:
        """JSON-able: candidates, backlogs, estimates, the choice."""
        plan = self.plan
        return {
            "plan": plan.id,
            "rid": plan.rid,
            "engine_rid": plan.engine_rid,
            "policy": self.policy,
            "age_s": round(now - self.decided_s, 3),
            "prompt_tokens": self.prompt_tokens,
            "prefill": {"chosen": plan.prefill, "candidates": self._engines(True)},
            "decode": {"chosen": plan.decode, "candidates": self._engines(False)},
            "load": msgspec.to_builtins(self.load),
            "hit_blocks": len(plan.keys),
            "held_blocks": plan.held_blocks,
            "lacking": plan.lacking,
            "estimated_read_s": plan.estimated_read_s,
            "agents": self._agents(),
            "ranges": msgspec.to_builtins(plan.ranges),
            "parts": msgspec.to_builtins(plan.parts),
        }

    def _engines(self, prefill: bool) -> list[CandidateView]:
        rows = np.flatnonzero(self.usable_engines & (self.is_prefill == prefill))
        return [
            {
                "name": self.engine_names[row],
                "pending_tokens": float(self.pending_tokens[row]),
                "context_tokens": float(self.context_tokens[row]),
                "sequences": float(self.sequences[row]),
            }
            for row in rows
        ]

    def _agents(self) -> list[ReaderView]:
        given = self.plan.read_bytes()
        return [
            {
                "name": self.agent_names[row],
                "backlog_s": by_device(self.backlog_s[row]),
                "bytes_per_s": by_device(self.bytes_per_s[row]),
                "read_bytes": sum(given.get(self.agent_names[row], {}).values()),
            }
            for row in np.flatnonzero(self.usable_agents)
        ]


def by_device(values: Floats) -> dict[str, float]:
    """Numbers of one agent, under the names of its devices."""
    return {device.name.lower(): float(values[device]) for device in Device}


class Decisions:
    """The last ``kept`` decisions by plan number; also found by request id."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._decisions: OrderedDict[PlanId, Decision] = OrderedDict()

    def note(
        self,
        plan: Plan,
        state: ClusterState,
        policy: str,
        prompt_tokens: int,
        load: LoadEstimate | None,
        now: float,
    ) -> None:
        """Remember what ``plan`` was made of; call it before the plan's promises are made."""
        engines, agents = state.engines, state.agents
        count = len(state.usable_engines)
        promised = engines.promised[:count]
        self._decisions[plan.id] = Decision(
            plan,
            policy,
            now,
            prompt_tokens,
            load,
            engines.names,
            agents.names,
            state.usable_engines,
            state.usable_agents,
            engines.is_prefill[:count].copy(),
            engines.pending_tokens[:count] + promised[:, engines.TOKENS],
            engines.context_tokens[:count] + promised[:, engines.CONTEXT],
            engines.sequences[:count] + promised[:, engines.SEQUENCES],
            state.backlog_s(),
            state.bytes_per_s,
        )
        if len(self._decisions) > self._kept:
            self._decisions.popitem(last=False)

    def find(self, plan: PlanId | str) -> Decision | None:
        """By plan number, or the latest of a request id, the client's or the engines'."""
        if isinstance(plan, int):
            return self._decisions.get(PlanId(plan))
        latest = reversed(self._decisions.values())
        return next((d for d in latest if plan in (d.plan.rid, d.plan.engine_rid)), None)

    def expected_first_token_s(self, plan: PlanId) -> float:
        """What a plan's choice to load or to recompute was made by, from the plan on; 0 where
        there was no such choice, or the prefill engine's speed was not known."""
        decision = self.find(plan)
        load = decision.load if decision is not None else None
        # To compute everything takes no time only as long as nothing is measured.
        return load.chosen_s if load is not None and load.recompute_all_s else 0.0
