"""What ``transfer.check`` says of a machine: recorded trees of sysfs, and facts of its tools."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest

from tests.transfer.pacing.sysfs_tree import hgx
from transfer.check import __main__ as command
from transfer.check import probe
from transfer.check.facts import parse_dcb
from transfer.check.findings import (
    EthernetFacts,
    Finding,
    RoceFacts,
    State,
    judge_ethernet,
    judge_gpus,
    judge_rdma,
)
from transfer.check.machine import Link, Machine, NetDevice, read_machine
from transfer.check.probe import Measured, judge
from transfer.check.report import Report
from transfer.traffic.classes import TrafficSettings

SITE = TrafficSettings()
LINKS = {"eth0": Link(True, 400_000, 4200, ["10.0.0.1"]), "eth9": Link(True, 25_000, 1500)}
NO_GID = "0000:0000:0000:0000:0000:0000:0000:0000"
ROCE = RoceFacts(lossless=[1, 3], priority_of_dscp={26: 3, 8: 1})


def as_network(root: Path, layer: str, gids: dict[int, str]) -> Path:
    """Give every RDMA port of a tree a link layer, and addresses (index -> kind)."""
    for port in root.glob("class/infiniband/*/ports/1"):
        (port / "link_layer").write_text(f"{layer}\n")
        for folder in ("gids", "gid_attrs/types", "gid_attrs/ndevs"):
            (port / folder).mkdir(parents=True)
        for index in range(4):
            kind = gids.get(index)
            address = f"fe80:0000:0000:0000:0000:0000:0000:000{index}" if kind else NO_GID
            (port / "gids" / str(index)).write_text(f"{address}\n")
            if kind:  # of an unused entry, reading gives EINVAL
                (port / "gid_attrs/types" / str(index)).write_text(f"{kind}\n")
                (port / "gid_attrs/ndevs" / str(index)).write_text("eth0\n")
    return root


def infiniband(root: Path, **more) -> Machine:
    return read_machine(as_network(hgx(root, **more), "InfiniBand", {0: "IB/RoCE v1"}), LINKS)


def roce(root: Path, gids: dict[int, str] | None = None) -> Machine:
    kinds = gids or {0: "IB/RoCE v1", 1: "RoCE v2"}
    return read_machine(as_network(hgx(root), "Ethernet", kinds), LINKS)


# ---- recorded machines ------------------------------------------------------------------------


def test_a_machine_with_infiniband_has_service_levels_which_only_a_probe_proves(tmp_path):
    machine = infiniband(tmp_path)
    assert machine.network == "infiniband" and len(machine.rdma) == 9
    device = machine.rdma[0]
    assert [(gid.index, gid.kind) for gid in device.ports[0].gids] == [(0, "IB/RoCE v1")]
    [finding] = judge_rdma(device, device.ports[0], None, None, SITE)
    assert finding.state is State.UNPROVEN
    assert "service level 2" in finding.what and "400 Gb/sec" in finding.what
    assert "--network ib" in finding.cost


def test_a_roce_machine_names_its_network_device_and_its_routable_address(tmp_path):
    machine = roce(tmp_path)
    port = machine.rdma[3].ports[0]
    assert machine.network == "roce" and port.net_device == "eth0"
    assert [gid.index for gid in port.gids if gid.kind == "RoCE v2"] == [1]
    found = judge_rdma(machine.rdma[3], port, ROCE, machine.net_device("eth0"), SITE)
    assert [finding.state for finding in found] == [State.UNPROVEN]
    assert "--peer" in found[0].cost


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"lossless": [3]}, "priority 1 of the low class has no flow control"),
        ({"lossless": []}, "priority 3 of the high class has no flow control"),
        ({"priority_of_dscp": {26: 3}}, "DSCP 8 of the low class has priority 0, not 1"),
        ({"priority_of_dscp": {26: 5, 8: 1}}, "DSCP 26 of the high class has priority 5, not 3"),
    ],
)
def test_half_of_a_roce_configuration_is_no_configuration(tmp_path, facts, words):
    machine = roce(tmp_path)
    device, settled = machine.rdma[0], msgspec.structs.replace(ROCE, **facts)
    found = judge_rdma(device, device.ports[0], settled, None, SITE)
    assert {finding.state for finding in found} == {State.HALF}
    [finding] = [finding for finding in found if words in finding.what]
    assert "--network roce --device eth0" in finding.cost


@pytest.mark.parametrize(
    ("setting", "forced"), [("Global tclass=106", 106), ("Global tclass=-1", None)]
)
def test_a_driver_that_overrides_the_class_is_found(tmp_path, setting, forced):
    as_network(hgx(tmp_path), "Ethernet", {1: "RoCE v2"})
    path = tmp_path / "class/infiniband/mlx5_0/tc/1/traffic_class"
    path.parent.mkdir(parents=True)
    path.write_text(f"{setting}\n")
    device = read_machine(tmp_path, LINKS).rdma[0]
    assert device.ports[0].forced_traffic_class == forced
    found = judge_rdma(device, device.ports[0], ROCE, None, SITE)
    halves = [finding.what for finding in found if finding.state is State.HALF]
    assert [f"traffic class {forced}" in what for what in halves] == [True] * (forced is not None)


@pytest.mark.parametrize(
    ("gids", "net", "words"),
    [
        ({0: "IB/RoCE v1"}, "eth0", "no RoCE v2 address"),
        ({1: "RoCE v2"}, "eth9", "eth9 has an MTU of 1500"),
    ],
)
def test_addresses_and_mtu_that_cost_something_are_said(tmp_path, gids, net, words):
    machine = roce(tmp_path, gids)
    device = machine.rdma[0]
    found = judge_rdma(device, device.ports[0], ROCE, machine.net_device(net), SITE)
    assert any(words in finding.what and finding.cost for finding in found)


def test_unreadable_priorities_are_not_taken_for_right_ones(tmp_path):
    device = roce(tmp_path).rdma[0]
    found = judge_rdma(device, device.ports[0], RoceFacts(None, None), None, SITE)
    assert any("not readable" in finding.what for finding in found)
    assert min(finding.state for finding in found) is State.UNPROVEN


def test_a_link_that_is_down_has_no_classes(tmp_path):
    device = infiniband(tmp_path, down="mlx5_2").rdma[2]
    assert judge_rdma(device, device.ports[0], None, None, SITE)[0].state is State.NONE


def test_gpus_far_from_every_nic_are_named(tmp_path):
    machine = infiniband(tmp_path)
    assert judge_gpus(machine) == []
    near = [device for device in machine.rdma if device.nic.numa_node == 0]
    far = judge_gpus(msgspec.structs.replace(machine, rdma=near))
    assert len(far) == 4 and all("NUMA node 1" in finding.what for finding in far)
    assert judge_gpus(msgspec.structs.replace(machine, rdma=[])) == []


def test_dcb_is_read_as_it_prints():
    facts = parse_dcb([False, True, False, True, False, False, False, False], [[26, 3], [8, 1]])
    assert facts == ROCE
    assert parse_dcb(None, None) == RoceFacts(None, None)


# ---- Ethernet without RDMA --------------------------------------------------------------------

ETH = NetDevice("eth9", LINKS["eth9"], -1)
IN_FORCE = EthernetFacts([], 25_000, True, True, 1, True)


@pytest.mark.parametrize(
    ("facts", "state", "words"),
    [
        ({}, State.EFFECT, "shared by class"),
        ({"has_marks": None}, State.UNPROVEN, "without root"),
        ({"queues_mbit": None, "has_marks": False}, State.NONE, "no traffic classes"),
        ({"queues_mbit": None, "has_marks": None}, State.NONE, "no traffic classes"),
        ({"queues_mbit": None, "absent_packages": ["nftables"]}, State.NONE, "nftables"),
        ({"queues_mbit": None}, State.HALF, "does not share"),
        ({"has_marks": False}, State.HALF, "nothing marks"),
        ({"queues_mbit": 40_000.0}, State.HALF, "but the link has 25000"),
        ({"has_group": False, "group_pids": 0}, State.HALF, "does not exist"),
        ({"may_join": False, "group_pids": 0}, State.HALF, "may not start processes"),
        ({"may_join": False}, State.EFFECT, "shared by class"),
    ],
)
def test_an_ethernet_device_is_judged_by_what_is_in_force(facts, state, words):
    found = judge_ethernet(ETH, msgspec.structs.replace(IN_FORCE, **facts), SITE)
    assert min(finding.state for finding in found) is state
    assert any(words in finding.what for finding in found)
    if state <= State.HALF:
        assert all(finding.cost for finding in found)


# ---- measurements -----------------------------------------------------------------------------

SHARED = Measured(False, 100, 100, 98, 3, 1.0, 1.5)


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, State.EFFECT),
        ({"high_beside_mbit": 50, "low_beside_mbit": 50}, State.NONE),
        ({"high_beside_mbit": 40, "low_beside_mbit": 20}, State.UNPROVEN),
        ({"high_beside_mbit": 99, "low_beside_mbit": 95}, State.UNPROVEN),
        ({"is_one_machine": True}, State.UNPROVEN),
    ],
)
def test_a_measurement_proves_only_what_the_link_decided(changes, state):
    assert judge(msgspec.structs.replace(SHARED, **changes)).state is state


def test_what_was_measured_counts_more_than_what_is_configured():
    machine = Machine([ETH], [], [])
    seen = {"eth9": [Finding(State.EFFECT, "set")]}
    for verdict, code in ((State.NONE, 1), (State.UNPROVEN, 0), (State.EFFECT, 0)):
        report = Report(machine, SITE, seen, [], SHARED, Finding(verdict, "measured"))
        assert report.exit_code == code
    half = {"eth9": [Finding(State.HALF, "half"), Finding(State.EFFECT, "set")]}
    assert Report(machine, SITE, half, []).exit_code == 2


# ---- the command ------------------------------------------------------------------------------


def test_a_recorded_machine_is_checked_for_a_script(tmp_path, capsys):
    as_network(hgx(tmp_path), "InfiniBand", {0: "IB/RoCE v1"})
    assert command.main(["--json", "--sysfs", str(tmp_path)]) == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["network"], found["state"], found["exit_code"]) == ("infiniband", "unproven", 2)
    assert len(found["findings"]) == 9 and found["measured"] is None
    assert found["class_of_kind"]["agent"] == "low"


def test_people_get_devices_near_gpus_and_sentences(tmp_path, capsys):
    as_network(hgx(tmp_path), "InfiniBand", {0: "IB/RoCE v1"})
    command.main(["--sysfs", str(tmp_path), "--device", "mlx5_4"])
    shown = capsys.readouterr().out
    assert "0000:97:11.0" in shown and "Result: not proven (exit code 2)" in shown
    assert "mlx5_4 port 1" in shown and "mlx5_3 port 1" not in shown


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--device eth99", "there is no device eth99"),
        ("--peer 127.0.0.1 --port 1", "does not answer: start `python -m transfer.check --serve"),
        ("--peer no.such.host.invalid", "does not answer"),
        ("--traffic {", "traffic settings"),
    ],
)
def test_what_cannot_be_checked_has_an_exit_code_of_its_own(capsys, monkeypatch, line, words):
    monkeypatch.setattr(probe, "ASK_TIMEOUT_MS", 200)
    assert command.main(line.split()) == 3
    assert words in capsys.readouterr().err


def test_unknown_flags_have_it_too():
    with pytest.raises(SystemExit) as ended:
        command.main(["--no-such-flag"])
    assert ended.value.code == 3


def test_the_check_runs_without_root(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert command.main([]) in (1, 2)
    assert "Result:" in capsys.readouterr().out
