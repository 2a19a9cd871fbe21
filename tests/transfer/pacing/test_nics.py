"""Which NICs a machine has and which are used for what; from trees of sysfs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.transfer.pacing.sysfs_tree import ethernet, hgx, one_socket
from transfer.pacing import nics
from transfer.pacing.route import device_to


@pytest.fixture
def sysfs(tmp_path):
    return hgx(tmp_path)


def test_devices_are_found_with_rate_link_and_numa_node(sysfs):
    found = nics.rdma_nics(sysfs)
    assert [nic.name for nic in found] == [f"mlx5_{n}" for n in range(9)]
    assert all(nic.bytes_per_s == 50e9 and nic.is_active for nic in found)
    assert [nic.numa_node for nic in found] == [0] * 4 + [1] * 4 + [0]
    assert [gpu.index for gpu in nics.gpus(sysfs)] == list(range(8))
    assert nics.rdma_sent_bytes(["mlx5_0", "mlx5_1", "absent"], sysfs) == 2 * 1000
    assert nics.numa_node_count(sysfs) == 2


def test_each_gpu_has_the_nic_behind_its_own_switch(sysfs):
    found = nics.rdma_nics(sysfs)
    assert [nics.nearest(found, gpu) for gpu in nics.gpus(sysfs)] == [
        [f"mlx5_{n}"] for n in range(8)
    ]


def test_without_its_own_nic_a_gpu_has_those_of_its_socket(tmp_path):
    found = nics.usable(nics.rdma_nics(hgx(tmp_path, down="mlx5_5")), "")
    gpu = nics.gpus(tmp_path)[5]
    assert nics.nearest(found, gpu) == ["mlx5_4", "mlx5_6", "mlx5_7"]


def test_an_agent_uses_its_engines_nics_and_goes_over_to_the_others(sysfs):
    found, all_gpus = nics.usable(nics.rdma_nics(sysfs), "mlx5_2,mlx5_3,mlx5_6"), nics.gpus(sysfs)
    chosen = nics.agent_topology(found, all_gpus[2:4], 2)
    assert chosen == {f"cpu:{node}": (["mlx5_2", "mlx5_3"], ["mlx5_6"]) for node in (0, 1)}
    assert nics.agent_topology(found, [], 1) == {"cpu:0": (["mlx5_2", "mlx5_3", "mlx5_6"], [])}
    assert nics.nearest([], all_gpus[0]) == []


def test_two_agents_of_one_machine_do_not_meet_on_a_nic(sysfs):
    found, all_gpus = nics.rdma_nics(sysfs), nics.gpus(sysfs)
    halves = all_gpus[:4], all_gpus[4:]
    first, second = (set(nics.agent_topology(found, half, 1)["cpu:0"][0]) for half in halves)
    assert len(first) == len(second) == 4 and not first & second


def test_a_machine_without_numa_has_nearness_too(tmp_path):
    found = nics.rdma_nics(one_socket(tmp_path))
    assert [nic.numa_node for nic in found] == [-1, -1] and nics.numa_node_count(tmp_path) == 1
    # Below one root without a switch all are equally far.
    assert nics.nearest(found, nics.gpus(tmp_path)[0]) == ["rdma1", "rdma2"]


def test_mooncake_is_given_the_topology_while_it_starts_unless_the_operator_has_one(monkeypatch):
    chosen: nics.Topology = {"cpu:0": (["mlx5_0"], ["mlx5_1"])}
    with nics.given_to_mooncake(chosen):
        path = Path(os.environ["MC_CUSTOM_TOPO_JSON"])
        assert json.loads(path.read_text()) == {"cpu:0": [["mlx5_0"], ["mlx5_1"]]}
    assert "MC_CUSTOM_TOPO_JSON" not in os.environ and not path.exists()
    with nics.given_to_mooncake({}):
        assert "MC_CUSTOM_TOPO_JSON" not in os.environ
    monkeypatch.setenv("MC_CUSTOM_TOPO_JSON", "mine.json")
    with nics.given_to_mooncake(chosen):
        assert os.environ["MC_CUSTOM_TOPO_JSON"] == "mine.json"


def test_a_link_whose_rate_the_driver_does_not_know_has_none(tmp_path):
    for device, mbit in (("eth0", 25_000), ("ens3", None), ("veth0", -1)):
        ethernet(tmp_path, device, mbit)
    rates = [nics.link_bytes_per_s(name, tmp_path) for name in ("eth0", "ens3", "veth0", "none")]
    assert rates == [25e9 / 8, None, None, None]


def test_the_kernel_names_the_device_for_an_address():
    assert device_to("127.0.0.1") == "lo"
    assert nics.link_sent_bytes("lo") > 0
    with pytest.raises(OSError, match="no network device"):
        nics.link_sent_bytes("absent0")
    with pytest.raises(OSError, match="address"):
        device_to("localhost")
