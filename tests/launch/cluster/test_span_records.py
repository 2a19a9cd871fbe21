"""Records of engines over several hosts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import EngineConfig
from launch.cluster.config import ClusterConfig
from launch.cluster.hardware import Hardware
from launch.cluster.layout import Layout, places_of
from launch.cluster.ports import respawn
from launch.cluster.process_record import ProcessRecord
from launch.cluster.processes import process_records
from launch.gateway.config import GatewayConfig
from launch.settings import BadConfig
from tests.launch.cluster.test_processes import flag_value, mooncake_ports
from transfer.agent.config import AgentConfig

CPU = Hardware("cpu", "tcp", "test")
MODEL = Path("/models/tiny")
HOSTS = {"p0": "10.0.0.1", "p0-1": "10.0.0.2", "d0": "10.0.0.3"}


def records_of(flags: str, hosts: dict[str, str]) -> dict[str, ProcessRecord]:
    config = ClusterConfig(prefill_args=tuple(flags.split()))
    return {record.name: record for record in process_records(config, MODEL, CPU, hosts)}


def test_an_engine_has_a_process_and_an_agent_on_each_of_its_hosts():
    records = records_of("--tp 2 --nnodes 2", HOSTS)
    assert list(records) == [
        *("agent-p0", "agent-d0", "agent-p0-1"),
        *("p0", "d0", "p0-1", "gateway"),
    ]
    assert [records[name].together for name in ("p0", "p0-1", "d0")] == ["p0", "p0", ""]
    first, second = records["p0"], records["p0-1"]
    for record, rank in ((first, "0"), (second, "1")):
        address = HOSTS[record.name]
        assert flag_value(record, "--node-rank") == rank
        assert flag_value(record, "--nnodes") == "2"
        assert (
            flag_value(record, "--host") == record.env["SGLANG_HOST_IP"] == record.host == address
        )
        assert EngineConfig.from_env(record.env).spanned_from == address
    met_at = flag_value(first, "--dist-init-addr")
    assert met_at == flag_value(second, "--dist-init-addr") and met_at.startswith("10.0.0.1:")
    assert int(met_at.rpartition(":")[2]) == first.choices["meeting"].start
    assert len(first.choices["meeting"]) == 14
    assert EngineConfig.from_env(records["d0"].env).spanned_from == ""
    assert "--node-rank" not in records["d0"].argv


def test_each_host_has_a_sign_of_life_of_its_own_and_the_gateway_knows_the_first():
    records = records_of("--tp 2 --nnodes 2", HOSTS)
    gateway = GatewayConfig.from_env(records["gateway"].env)
    assert [engine.name for engine in gateway.engines] == ["p0", "d0"]
    assert gateway.engines[0].http.startswith("http://10.0.0.1:")
    first, second = records["p0"], records["p0-1"]
    assert first.alive.target == gateway.engines[0].control
    assert second.alive.target == f"tcp://10.0.0.2:{second.ports['control']}"
    assert EngineConfig.from_env(second.env).controls == [second.alive.target]
    assert second.alive.server == "p0"
    assert second.ready[0].target.startswith("http://10.0.0.2:")
    assert set(gateway.agents) == {"agent-p0", "agent-p0-1", "agent-d0"}
    agent = AgentConfig.from_env(records["agent-p0-1"].env)
    assert (agent.host, agent.engines) == ("10.0.0.2", ["p0", "d0"])
    assert gateway.engines[0].agent == "agent-p0", "which stores for all ranks of a group"


def test_a_group_answers_where_its_first_rank_is():
    records = records_of("--tp 4 --attn-dp-size 2 --nnodes 2", HOSTS)
    gateway = GatewayConfig.from_env(records["gateway"].env)
    groups = [engine for engine in gateway.engines if engine.role == "prefill"]
    assert [group.agent for group in groups] == ["agent-p0", "agent-p0-1"]
    controls = [group.control for group in groups]
    assert [control.rpartition(":")[0] for control in controls] == [
        "tcp://10.0.0.1",
        "tcp://10.0.0.2",
    ]
    assert groups[0].http == groups[1].http and groups[0].http.startswith("http://10.0.0.1:")
    second = records["p0-1"]
    assert (second.alive.target, second.alive.server) == (controls[1], "p0.1")
    assert EngineConfig.from_env(second.env).controls[1] == controls[1]


def test_all_ranks_know_the_port_that_the_first_host_opens_for_decode_engines():
    records = records_of("--tp 2 --nnodes 2", {"d0": "10.0.0.3"})  # both places on one machine
    first, second = records["p0"], records["p0-1"]
    assert "bootstrap" in first.ports and "bootstrap" not in second.ports
    for turn in (0, 3, 9):
        ports = {
            flag_value(respawn(record, turn), "--disaggregation-bootstrap-port")
            for record in (first, second)
        }
        assert ports == {str(respawn(first, turn).ports["bootstrap"])}


@pytest.mark.parametrize("hosts", [HOSTS, dict.fromkeys(HOSTS, "10.0.0.1")])
def test_no_port_of_a_host_is_used_twice(hosts):
    records = records_of("--tp 4 --nnodes 2 --attn-dp-size 2", hosts).values()
    for host in set(hosts.values()):
        here = [record for record in records if record.host == host]
        ports = [port for record in here for port in record.ports.values()]
        for record in here:
            ports += mooncake_ports(record)
        ports += [port for record in here for port in record.choices.get("meeting", ())]
        assert len(ports) == len(set(ports))


def test_each_host_gives_gpus_to_its_own_ranks():
    hosts = {"p0": "10.0.0.1", "d0": "10.0.0.1", "p0-1": "10.0.0.2"}
    config = ClusterConfig(prefill_args=("--tp", "16", "--nnodes", "2"), decode_args=("--tp", "8"))
    layout = Layout(config, MODEL, replace(CPU, device="cuda"), places_of(config, hosts))
    gpus = {node: layout.gpus(node) for node in layout.nodes}
    assert gpus == {"p0": [*range(8)], "d0": [*range(8, 16)], "p0-1": [*range(8)]}


@pytest.mark.parametrize("flags", ["--tp 2 --nnodes 4", "--nnodes 2", "--tp 2 --nnodes 0"])
def test_ranks_must_be_spread_evenly(flags):
    with pytest.raises(BadConfig, match="--nnodes"):
        records_of(flags, {})
