"""The benchmark of one core: real parts are measured, and cores follow from unit costs."""

from __future__ import annotations

import msgspec
import pytest

from benchmarks import yardstick
from benchmarks.scale import agent, decode, directory, gateway
from benchmarks.scale.agent import AgentCosts
from benchmarks.scale.costs import Costs, cores, scaled
from benchmarks.scale.decode import DecodeCosts
from benchmarks.scale.demand import Demand
from benchmarks.scale.directory import DirectoryCosts, Planning
from benchmarks.scale.gateway import GatewayCosts
from benchmarks.scheduler.speed import Speed
from common.block import BlockLayout

SPEED = Speed(0.2, 0.4, 0.4, 2000.0, 1000.0)
OF_AGENT = AgentCosts(1e-3, 1e-3, 1e-4, 5e-5, 1e-3)
COSTS = Costs(
    GatewayCosts(0.01, 0.005, 20e-6, 1e-3),
    Planning(SPEED, SPEED),
    DirectoryCosts(67.0, 1e-6, 2e-6, 2e-6, 1e-6, 0.1, 0.5),
    OF_AGENT,
    OF_AGENT,
    OF_AGENT,
    DecodeCosts(50e-6, 1e-3),
)
SMALL = BlockLayout(64, 3, (256, 128))


def all_positive(costs: msgspec.Struct) -> bool:
    return all(value > 0 for value in msgspec.to_builtins(costs).values())


def test_a_time_of_a_machine_half_as_fast_counts_half(monkeypatch):
    monkeypatch.setattr(yardstick, "_sum_s", lambda: 2 * yardstick.REFERENCE_S)
    measured = yardstick.Yardstick()
    assert measured.scale == pytest.approx(0.5)
    monkeypatch.setattr(yardstick, "_sum_s", lambda: yardstick.REFERENCE_S)
    for _ in range(2):
        measured.look()
    assert measured.scale == pytest.approx(1.0)  # the median of its looks
    halved = scaled(COSTS, 0.5)
    assert halved.gateway.request_s == pytest.approx(0.005)
    assert halved.directory.change_bytes == 67.0
    assert halved.planning.small.plan_p99_ms == pytest.approx(0.2)
    assert halved.planning.small.cycles_per_s == pytest.approx(2000.0)


def test_the_demand_is_the_papers_workload_at_the_rate_of_the_storage_nics():
    demand = Demand(144)
    assert demand.turns_per_s == pytest.approx(840, rel=0.01)
    assert demand.hit_blocks == 510
    assert demand.streamed_tokens_per_s == pytest.approx(176 * demand.turns_per_s)
    # Every agent announces what it finds of all agents' blocks: with the square of the nodes.
    ten = Demand(1440)
    assert ten.remote_changes_per_s == pytest.approx(100 * demand.remote_changes_per_s)
    assert ten.pulled_blocks_per_s == pytest.approx(demand.pulled_blocks_per_s)


def test_cores_are_demand_times_cost():
    needed = cores(COSTS)
    turns_per_s = Demand(144).turns_per_s
    assert needed["gateway: requests"]["144 nodes"] == pytest.approx(turns_per_s * 0.005)
    assert needed["one decode engine's scheduler thread"]["1,000 nodes"] == pytest.approx(0.05)
    per_step = needed["one agent: MLA, 8 ranks"]["144 nodes"]
    assert per_step > needed["one agent: MLA, 1 rank"]["144 nodes"]


def test_an_agents_own_jobs_are_measured():
    assert all_positive(agent.measure(SMALL, ranks=2, shards=2, rounds=1))


def test_announcements_and_plans_are_measured():
    costs, planning = directory.measure(40_000, 5, 1, lambda part: None)
    assert all_positive(costs)
    assert all_positive(planning.small) and all_positive(planning.large)
    assert costs.change_bytes > 32  # whole keys so far


@pytest.mark.slow
def test_a_decode_engines_hooks_are_measured(monkeypatch):
    monkeypatch.setattr(decode, "CONTEXT_TOKENS", 4 * decode.PAGE_TOKENS)
    monkeypatch.setattr(decode, "DECODE_BATCH", 2)
    monkeypatch.setattr("engine.runtime._runtime", None)  # what is set here is taken back
    assert all_positive(decode.measure(1))


@pytest.mark.slow
def test_a_gateway_of_its_own_process_is_measured(monkeypatch):
    monkeypatch.setattr(gateway, "NODES", (1, 1))
    monkeypatch.setattr(gateway, "IDLE_S", 0.5)
    monkeypatch.setattr(gateway, "STREAM_TOKENS", 8)
    costs = gateway.measure(rounds=1, requests=1)
    assert costs.node_s > 0  # the others are so small here that what else it does is more
