"""The fluid model with the real scheduler: slow nodes are shed, come back, nothing oscillates."""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks.scheduler.balance import balance, job_times, step
from benchmarks.scheduler.fluid import Clock, Fluid, Nic, Workload


def silent(_: float) -> None:
    pass


def test_a_nic_of_the_model_serves_in_turn_at_its_present_rate():
    clock, ends = Clock(), []
    nic = Nic(clock, 100.0)
    for name, size in (("first", 200.0), ("second", 100.0)):
        nic.read(size, partial(lambda name: ends.append((name, clock.now)), name))
    clock.after(1.0, nic.set_rate, 25.0)  # 100 of the first are left: 4 s more
    clock.after(7.0, nic.set_rate, 100.0)  # 50 of the second are left
    clock.run(6.0)
    nic.advance()
    assert (nic.read_bytes, nic.queue_bytes) == (pytest.approx(200), pytest.approx(100))
    clock.run(100.0)
    assert ends == [("first", pytest.approx(5.0)), ("second", pytest.approx(7.5))]
    assert (nic.read_bytes, nic.queue_bytes) == (pytest.approx(300), 0)


def test_the_model_reads_what_its_turns_hit(monkeypatch):
    """Every turn that was asked for ends, and each hit block came over one NIC."""
    fluid = Fluid("n-way", (1, 2), Workload(load=0.5, turns=40))
    asked = []
    plan = fluid.cluster.scheduler.plan

    def watched(request, now):
        asked.append(len(request.keys))
        return plan(request, now)

    monkeypatch.setattr(fluid.cluster.scheduler, "plan", watched)
    assert fluid.run_job(600.0) is not None
    assert fluid.read_bytes().sum() == pytest.approx(sum(asked) * fluid.hardware.block_bytes)
    view = fluid.cluster.scheduler.cluster(fluid.clock.now)
    assert (len(asked), view["open_plans"], fluid.turns_done) == (40, 0, 40)


@pytest.mark.slow
def test_shares_follow_a_step_of_one_nodes_rate_and_stay():
    """To a tenth and back: in 10 s within 10 % of ideal, and there for 60 s; of every node, of
    what they read and of what they are given to read."""
    result = step("n-way", (4, 8), 1.15, silent)
    assert result.worst_read <= 0.1
    assert result.worst_given <= 0.1


@pytest.mark.slow
def test_policies_differ_as_they_should_when_nics_are_barely_saturated():
    found = {
        policy: balance(policy, (4, 8), 1.1, 30.0, silent)[0]
        for policy in ("n-way", "shorter-queue", "round-robin", "prefill")
    }
    assert all(result.waiting_s_least > 0 for result in found.values())
    max_avg = [result.max_avg for result in found.values()]
    assert max_avg == sorted(max_avg) and max_avg[0] <= 1.05
    turns = [result.turns_per_s for result in found.values()]
    assert turns == sorted(turns, reverse=True)
    assert found["prefill"].max_avg == pytest.approx(3.0, rel=0.01), "a third of the NICs read"


@pytest.mark.slow
def test_one_slow_node_slows_an_n_way_job_by_no_more_than_its_lost_rate():
    job = job_times("n-way", (4, 8), 1.5, turns=3000, slow_part=0.25)
    assert job.over_ideal <= 1.08
