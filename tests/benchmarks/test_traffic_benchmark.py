"""What the traffic benchmark makes of its rounds."""

from __future__ import annotations

import json

import pytest

from benchmarks.goals import write_report
from benchmarks.traffic import engines, measure, results
from benchmarks.traffic.cluster import ClusterSample, moved_bytes
from benchmarks.traffic.measure import Sample
from benchmarks.traffic.results import Results


def rounds() -> Results:
    """Two rounds: the second runs at half the speed, which must not show in any ratio."""
    found = Results()
    for speed in (1.0, 0.5):
        for arm in measure.ARMS:
            high = {"control": 30, "classes": 29.7, "neither": 15, "pacer alone": 28.8}
            sample = Sample(
                high_rate=speed * high.get(arm.name.split(",")[0], 30),
                message_p99_s=0.005 if "control" in arm.name else 0.006,
                kv_rate=speed * {"kv alone": 47.7, "classes": 17.28}.get(arm.name, 10),
            )
            found.link.setdefault(arm.name, []).append(sample)
        for arm, tpot_s in zip(engines.ARMS, (0.010, 0.0102, 0.012, 0.030), strict=True):
            found.engine.setdefault(arm.name, []).append(Sample(tpot_s=tpot_s / speed))
    found.cluster = ClusterSample(
        requests=2,
        link_bytes={"low": 105, "high": 300},
        moved_bytes={"low": 100, "high": 200},
    )
    return found


def test_goals_are_medians_of_each_rounds_own_ratios(tmp_path):
    goals = results.make_goals(rounds())
    values = [round(goal.value, 4) for goal in goals]
    assert values == [0.99, 0.99, 1.0, 0.96, 0.96, 0.96, 2.0, 1.05, 1.05, 1.5, 0]
    assert all(goal.holds for goal in goals)
    harm = results.harm(rounds())
    assert harm["high-class throughput, of control"] == 0.5
    assert round(harm["TPOT, above control, %"]) == 200
    write_report(tmp_path / "out.json", goals, results.figures(rounds()))
    report = json.loads((tmp_path / "out.json").read_text())
    assert len(report["goals"]) == 11 and len(report["rounds"]["link"]["classes"]) == 2


def test_every_goal_is_there_when_nothing_was_measured():
    goals = results.make_goals(Results())
    assert len(goals) == 11
    assert not any(goal.holds for goal in goals) and {goal.value for goal in goals} == {None}


@pytest.mark.parametrize(
    ("low", "high"),
    [(99, 301), (140, 260)],
    ids=["an agent's bytes among the high", "an engine's bytes among the low"],
)
def test_bytes_in_the_wrong_class_fail_a_goal(low, high):
    found = rounds()
    found.cluster.link_bytes = {"low": low, "high": high}
    assert [goal.holds for goal in results.make_goals(found)].count(False) == 1


def test_what_a_cluster_has_sent_over_the_link_is_told_by_class():
    metrics = {
        'dualpath:agent_moved_bytes_total{class="low",operation="write",nic="compute"}': 5.0,
        'dualpath:agent_moved_bytes_total{class="low",operation="write",nic="lo"}': 70.0,
        'dualpath:agent_moved_bytes_total{class="high",operation="read",nic="lo"}': 70.0,
        'dualpath:engine_moved_bytes_total{class="high",operation="write",nic="compute"}': 9.0,
        "dualpath:agent_writes_total": 1.0,
    }
    assert moved_bytes(metrics) == {"low": 5, "high": 9}


def test_the_control_arms_move_kv_as_the_others_do_but_elsewhere():
    for arm in (*measure.ARMS, *engines.ARMS):
        assert arm.kv == ("storage" if "control" in arm.name else "compute"), arm.name
        assert arm.pace == "off" or not arm.has_classes
