"""Where KV movement is paced, and what is counted for which NIC."""

from __future__ import annotations

import pytest

from launch.cluster.config import load_config
from launch.settings import BadConfig
from tests.samples import by_name
from tests.transfer.pacing.sysfs_tree import ethernet, hgx
from transfer.pacing.agent_pacing import AgentPacing, PaceSettings, pacer_samples
from transfer.pacing.pacer import BadPace, read_pace
from transfer.pacing.peer_nics import MovedBytes, PeerNics


class Machine:
    """Two links; the route to 10.0.0.2 can be moved."""

    def __init__(self, sysfs, is_rdma=False) -> None:
        self.sysfs = sysfs
        self.routes = {"10.0.0.2": "eth0", "10.0.0.3": "eth1"}
        self.now = 0.0
        self.nics = PeerNics(self.is_local, is_rdma, self.lookup, lambda: self.now)

    def is_local(self, session: str) -> bool:
        return session.startswith("10.0.0.1:")

    def lookup(self, host: str) -> str:
        if host not in self.routes:
            raise OSError("no way")
        return self.routes[host]

    def pacing(self, pace, classes=(), **fields):
        return AgentPacing(
            PaceSettings(pace, **fields),
            self.nics,
            lambda now, counts: 0.0,
            has_classes=lambda device: device in classes,
            sysfs=self.sysfs,
        )


@pytest.fixture
def machine(tmp_path):
    ethernet(tmp_path, "eth0", 1000)
    return Machine(ethernet(tmp_path, "eth1", None))


def test_auto_paces_links_without_classes_whose_rate_is_known(machine):
    pacing = machine.pacing("auto")
    assert pacing.pacer_towards("10.0.0.2:5") is pacing.pacer_towards("10.0.0.2:6") is not None
    for session in ("10.0.0.1:5", "10.0.0.3:5", "10.0.0.9:5"):  # own node; no rate; no way
        assert pacing.pacer_towards(session) is None
    assert list(pacing.pacers()) == ["eth0"]
    assert machine.pacing("auto", classes=["eth0"]).pacer_towards("10.0.0.2:5") is None
    assert machine.pacing("on", classes=["eth0"]).pacer_towards("10.0.0.2:5") is not None
    assert machine.pacing("auto", nic_bytes_per_s=1e6).pacer_towards("10.0.0.3:5") is not None


def test_off_paces_nothing_and_a_rate_paces_every_link(machine):
    assert machine.pacing("off").pacer_towards("10.0.0.2:5") is None
    fixed = machine.pacing(2e6, classes=["eth0", "eth1"])
    first, second = fixed.pacer_towards("10.0.0.2:5"), fixed.pacer_towards("10.0.0.3:5")
    assert first is not None and second is not None and first is not second
    first.wait((False, 1, 1), lambda: None, 1000)
    samples = by_name(pacer_samples(fixed.pacers()))
    assert samples['dualpath:agent_pacer_bytes_per_second{nic="eth0"}'] == 2e6
    assert samples['dualpath:agent_pacer_bytes_total{nic="eth0"}'] == 1000
    assert samples['dualpath:agent_pacer_bytes_total{nic="eth1"}'] == 0


def test_rdma_is_paced_only_when_asked_to(tmp_path):
    machine = Machine(hgx(tmp_path), is_rdma=True)
    assert machine.pacing("auto").pacer_towards("10.0.0.2:5") is None
    pacer = machine.pacing("on", rdma_devices="mlx5_0,mlx5_1").pacer_towards("10.0.0.2:5")
    assert pacer is not None
    pacer.wait((False, 1, 1), lambda: None, 1000)
    assert 0.8 * 100e9 < pacer.stats().rate < 100e9


def test_when_the_route_moves_the_other_nics_pacer_is_used(machine):
    pacing = machine.pacing(2e6)
    before = pacing.pacer_towards("10.0.0.2:5")
    machine.routes["10.0.0.2"] = "eth1"
    assert pacing.pacer_towards("10.0.0.2:5") is before
    machine.now += 1
    assert pacing.pacer_towards("10.0.0.2:5") is pacing.pacers()["eth1"]


def test_bytes_count_for_class_nic_and_peer(machine):
    moved = MovedBytes(machine.nics, "agent")
    moved.samples({("write", "10.0.0.2"): 100, ("read", "10.0.0.1"): 7})
    machine.routes["10.0.0.2"] = "eth1"
    machine.now += 1
    samples = by_name(moved.samples({("write", "10.0.0.2"): 150, ("read", "10.0.0.1"): 7}))
    name = "dualpath:agent_moved_bytes_total"
    assert samples == {
        name + '{class="low",operation="write",nic="eth0",peer="10.0.0.2"}': 100,
        name + '{class="high",operation="read",nic="lo",peer="10.0.0.1"}': 7,
        name + '{class="low",operation="write",nic="eth1",peer="10.0.0.2"}': 50,
    }
    of_engine = MovedBytes(machine.nics, "engine").samples({("write", "10.0.0.3"): 9})
    assert by_name(of_engine) == {
        "dualpath:engine_moved_bytes_total"
        '{class="high",operation="write",nic="eth1",peer="10.0.0.3"}': 9
    }


def test_a_pace_is_a_word_or_a_rate():
    assert [read_pace(text) for text in ("auto", "off", "200MB")] == ["auto", "off", 2e8]
    for text in ("fast", "0", "-1"):
        with pytest.raises(BadPace, match="give"):
            read_pace(text)
    with pytest.raises(BadConfig, match="--kv-pace"):
        load_config(["--kv-pace", "quick"])
    assert load_config(["--kv-pace", "1GB"]).kv_pace == 1e9
