"""Every process of a cluster starts in its traffic class."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from common.ids import Incarnation
from launch.cluster.child import Child
from launch.cluster.config import ClusterConfig, load_config
from launch.cluster.console import make_summary
from launch.cluster.hardware import Hardware
from launch.cluster.process_record import HealthCheck, ProcessRecord
from launch.cluster.processes import process_records
from launch.settings import BadConfig
from transfer.traffic import cgroup
from transfer.traffic.classes import TrafficSettings, read_settings

RDMA = Hardware("cuda", "rdma", "test")
TCP = Hardware("cpu", "tcp", "test")
MODEL = Path("/models/tiny")


def records_of(hardware: Hardware = RDMA, environ=None, **settings) -> list[ProcessRecord]:
    config = ClusterConfig(prefill=1, decode=2, **settings)
    return process_records(config, MODEL, hardware, environ=environ or {})


def test_each_record_has_the_class_of_its_kind():
    classes = {record.name: record.traffic_class.value for record in records_of()}
    low = {name for name, found in classes.items() if found == "low"}
    assert low == {"agent-p0", "agent-d0", "agent-d1"}
    assert len(classes) == 7 and set(classes.values()) == {"low", "high"}


def test_mooncake_gets_the_marks_of_the_records_class():
    for record in records_of():
        marks = record.env.get("MC_IB_SL"), record.env.get("MC_IB_TC")
        wanted = {"agent": ("2", "32"), "engine": ("1", "104"), "gateway": (None, None)}
        assert marks == wanted[record.kind]
        assert record.cgroup == ("dualpath-low" if record.kind == "agent" else "")


def test_the_sites_own_marks_reach_the_records():
    records = records_of(
        traffic=read_settings('{"low": {"service_level": 4, "dscp": 10}, "cgroup": "a/b"}')
    )
    agent = records[0]
    assert (agent.env["MC_IB_SL"], agent.env["MC_IB_TC"], agent.cgroup) == ("4", "40", "a/b")


def test_a_mark_for_every_process_is_refused_where_it_would_count():
    with pytest.raises(BadConfig, match="MC_IB_TC .*unset it"):
        records_of(environ={"MC_IB_TC": "106"})
    for record in records_of(TCP, environ={"MC_IB_TC": "106"}):
        assert "MC_IB_TC" not in record.env


def test_marks_are_checked_with_the_other_settings(tmp_path):
    with pytest.raises(BadConfig, match="--traffic .*one priority"):
        load_config(["--traffic", '{"low": {"service_level": 2, "dscp": 25}}'])
    file = tmp_path / "cluster.yaml"
    file.write_text("traffic: {low_share_percent: 2}\n")
    assert load_config(["--config", str(file)]).traffic.low_share_percent == 2


@pytest.mark.parametrize(
    ("hardware", "words"),
    [(RDMA, ["service level 2", "DSCP 8", "service level 1"]), (TCP, ["nothing marks them"])],
)
def test_the_summary_says_which_classes_are_in_force(hardware, words):
    config = ClusterConfig(traffic=TrafficSettings(cgroup="dualpath-absent"))
    summary = make_summary(config, hardware, MODEL, [])
    [text] = [
        str(cell)
        for name, cell in zip(summary.columns[0].cells, summary.columns[2].cells, strict=True)
        if name == "traffic"
    ]
    assert all(word in text for word in words)


@pytest.mark.skipif(
    os.geteuid() != 0 or cgroup.mount_point() is None, reason="needs root and cgroup v2"
)
async def test_a_child_starts_in_its_control_group(tmp_path):
    group = cgroup.mount_point() / f"dualpath-test-{os.getpid()}"
    command = (sys.executable, "-c", "print(open('/proc/self/cgroup').read())")
    record = ProcessRecord(
        name="agent-p0",
        kind="agent",
        argv=command,
        env={},
        host="127.0.0.1",
        ports={},
        ready=(),
        alive=HealthCheck("http", ""),
        cgroup=group.name,
    )

    async def groups() -> str:
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        child = Child(record, log, {}, Incarnation(1))
        assert await child.exited_within(10)
        return log.read_text()

    assert group.name not in await groups()  # there is no such group: it starts all the same
    group.mkdir()
    try:
        assert f"0::/{group.name}\n" in await groups()
    finally:
        await asyncio.sleep(0)
        group.rmdir()
