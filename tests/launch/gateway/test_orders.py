"""What operators ordered outlives the gateway that they told."""

from __future__ import annotations

import pytest

from benchmarks.testbed.oracle import ORACLE_CLASS
from launch.gateway.orders import Orders
from scheduler.policies import UnknownPolicy
from scheduler.scheduler import Scheduler
from tests.scheduler.clusters import report_agent, report_engine
from tests.scheduler.test_policies import EXAMPLE

NAMES = ("d0", "d1", "agent-d0")


def seen(scheduler: Scheduler) -> set[str]:
    """Report two engines of one agent; those that may get requests."""
    report_agent(scheduler, "agent-d0")
    for name in ("d0", "d1"):
        report_engine(scheduler, name, agent="agent-d0")
    view = scheduler.cluster(0.0)
    return {one["name"] for one in (*view["engines"], *view["agents"]) if not one["draining"]}


def test_a_restarted_gateway_obeys_the_orders_that_still_stand(tmp_path):
    first = Scheduler("prefill")
    orders = Orders(first, NAMES, tmp_path)
    assert seen(first) == {"d0", "d1", "agent-d0"}
    orders.set_policy("split")
    for name, on in (("d0", True), ("d1", True), ("agent-d0", True), ("d1", False)):
        orders.drain(name, on)
    second = Scheduler("prefill")
    again = Orders(second, NAMES, tmp_path)
    assert second.policy == "split"
    assert seen(second) == {"d1"}
    again.drain("d0", False)
    assert seen(second) == {"d0", "d1"}
    third = Scheduler("prefill")
    Orders(third, NAMES, tmp_path)
    assert seen(third) == {"d0", "d1"}


def test_an_engine_is_taken_back_before_it_reports_to_a_restarted_gateway(tmp_path):
    Orders(Scheduler("prefill"), NAMES, tmp_path).drain("d0", True)
    restarted = Scheduler("prefill")
    orders = Orders(restarted, NAMES, tmp_path)
    orders.drain("d0", False)
    orders.drain("agent-d0", True)
    assert seen(restarted) == {"d0", "d1"}
    third = Scheduler("prefill")
    Orders(third, NAMES, tmp_path)
    assert seen(third) == {"d0", "d1"}


@pytest.mark.parametrize(
    "written",
    [
        b"",
        b"\xff{",
        b'{"path_policy": 7}',
        b'{"path_policy": "os:getcwd", "drained": ["d0"]}',
        b'{"path_policy": "gone.module:Class", "drained": ["d0"]}',
        b'{"path_policy": "oracle", "drained": ["d0", "d7"]}',
    ],
)
def test_orders_that_cannot_be_followed_are_dropped_at_a_start(tmp_path, caplog, written):
    (tmp_path / "orders.json").write_bytes(written)
    scheduler = Scheduler("prefill")
    orders = Orders(scheduler, NAMES, tmp_path)
    assert scheduler.policy == "prefill"
    assert seen(scheduler) == ({"d1", "agent-d0"} if b"d0" in written else set(NAMES))
    assert "order" in caplog.text
    orders.set_policy("split")
    again = Scheduler("prefill")
    Orders(again, NAMES, tmp_path)
    assert again.policy == "split"


@pytest.mark.parametrize("name", ["os:getcwd", EXAMPLE, ORACLE_CLASS, "oracle", ""])
def test_a_class_of_ones_own_is_for_the_flag_to_name(tmp_path, name):
    orders = Orders(Scheduler("prefill"), NAMES, tmp_path)
    with pytest.raises(UnknownPolicy):
        orders.set_policy(name)
    flagged = Scheduler(EXAMPLE)
    orders = Orders(flagged, NAMES, tmp_path)
    orders.set_policy("split")
    orders.set_policy(EXAMPLE)
    assert flagged.policy == EXAMPLE


def test_an_order_that_cannot_be_followed_is_not_kept(tmp_path):
    orders = Orders(Scheduler("prefill"), NAMES, tmp_path)
    with pytest.raises(UnknownPolicy):
        orders.set_policy("none")
    with pytest.raises(KeyError):
        orders.drain("d7", True)
    again = Scheduler("prefill")
    Orders(again, NAMES, tmp_path)
    assert again.policy == "prefill" and seen(again) == {"d0", "d1", "agent-d0"}
