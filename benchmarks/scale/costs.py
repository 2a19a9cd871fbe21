"""Unit costs of all parts, and the cores that a demand takes of them."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from benchmarks.scale.agent import GQA, MLA, AgentCosts
from benchmarks.scale.decode import DecodeCosts
from benchmarks.scale.demand import STEP_S, Demand
from benchmarks.scale.directory import DirectoryCosts, Planning
from benchmarks.scale.gateway import GatewayCosts

Of = TypeVar("Of", bound=msgspec.Struct)

NODES = (144, 1000)
RANKS = 8


class Costs(msgspec.Struct, frozen=True):
    """CPU seconds."""

    gateway: GatewayCosts
    planning: Planning
    directory: DirectoryCosts
    mla: AgentCosts
    """One rank."""
    mla_ranks: AgentCosts
    """8 ranks, each with all of every block."""
    gqa_ranks: AgentCosts
    """8 ranks, each with its heads."""
    decode: DecodeCosts


def scaled(costs: Costs, scale: float) -> Costs:
    """Every time times this, every rate over it."""
    planning = costs.planning
    planning = Planning(planning.small.scaled(scale), planning.large.scaled(scale))
    return Costs(
        _times(costs.gateway, scale),
        planning,
        _times(costs.directory, scale),
        _times(costs.mla, scale),
        _times(costs.mla_ranks, scale),
        _times(costs.gqa_ranks, scale),
        _times(costs.decode, scale),
    )


def _times(costs: Of, scale: float) -> Of:
    """Those fields that are seconds."""
    names = [name for name in costs.__struct_fields__ if name.endswith("_s")]
    changed = {name: getattr(costs, name) * scale for name in names}
    return msgspec.structs.replace(costs, **changed)


def cores(costs: Costs) -> dict[str, dict[str, float]]:
    """By part, then by number of nodes. Of agents and decode engines: of one of them."""
    return {
        part: {f"{nodes:,} nodes": value for nodes, value in by_nodes.items()}
        for part, by_nodes in _cores(costs).items()
    }


def _cores(costs: Costs) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for nodes in NODES:
        demand = Demand(nodes)
        speed = costs.planning.small if nodes == NODES[0] else costs.planning.large
        rows = {
            "gateway: requests": demand.turns_per_s * costs.gateway.turn_s,
            "gateway: streamed tokens": demand.streamed_tokens_per_s * costs.gateway.token_s,
            "gateway: reports of nodes": nodes * costs.gateway.node_s,
            "planner: plans, look-ups, reports": demand.turns_per_s / speed.cycles_per_s,
            "planner: announcements": demand.local_changes_per_s * costs.directory.known_s,
            "planner: remote, announced by all": (
                demand.remote_changes_per_s * costs.directory.known_s
            ),
            "one agent: MLA, 1 rank": _agent(demand, costs.mla, MLA.num_layers),
            "one agent: MLA, 8 ranks": _agent(demand, costs.mla_ranks, MLA.num_layers * RANKS),
            "one agent: GQA, 8 ranks": _agent(demand, costs.gqa_ranks, GQA.num_layers * RANKS),
            "one decode engine's scheduler thread": _decode(costs.decode),
        }
        for part, value in rows.items():
            found.setdefault(part, {})[nodes] = value
    return found


def _agent(demand: Demand, costs: AgentCosts, steps: int) -> float:
    """Of a decode node; its pulls, and its part of all deliveries."""
    delivery_s = costs.deliver_loop_s + steps * costs.turn_step_s
    pulls_s = demand.pulled_blocks_per_s * costs.pull_turn_block_s
    return pulls_s + demand.deliveries_per_s * delivery_s


def _decode(costs: DecodeCosts) -> float:
    """A part of its thread: one step is :data:`STEP_S`."""
    return costs.step_s / STEP_S
