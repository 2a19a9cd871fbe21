"""A node's settings and processes are made on its own host."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.cluster.membership import Joined
from common.ids import Incarnation
from common.process_settings import SECRETS
from engine.config import EngineConfig
from launch.cluster.hardware import Hardware
from launch.cluster.process_record import ProcessRecord
from launch.node import address
from launch.node.address import network_of, own_address
from launch.node.config import NodeConfig, load_config
from launch.node.records import alike, node_layout, node_members, node_records
from launch.settings import BadConfig
from transfer.agent.config import AgentConfig

MODEL = Path("/models/tiny")
CPU = Hardware("cpu", "tcp", "test")
SECRET = "s" * 32
JOINED = Joined("p7", "lease", Incarnation(5), 0, {"agent-d0": "tcp://10.0.0.2:30100"}, ["d0"])
ARGV = ["--join", "http://10.0.0.1:30000", "--cluster-secret-file", "/secret"]


def config_of(*flags: str) -> NodeConfig:
    return load_config([*ARGV, "--name", "p7", *flags])


def environment_of(record: ProcessRecord, folder: Path) -> dict[str, str]:
    (folder / record.name).write_bytes(record.secrets)
    return {**record.env, SECRETS: str(folder / record.name)}


def test_flags_win_over_the_profile_of_the_role(tmp_path):
    profile = tmp_path / "profile.yaml"
    profile.write_text(
        "all: {dram-bytes: 2GiB, remote: memory://kv}\n"
        "prefill: {dram_bytes: 3GiB, engine-args: --tp-size 2}\n"
        "decode: {poison-kv: true}\n"
    )
    config = config_of("--role", "prefill", "--profile", str(profile), "--remote", "memory://x")
    assert (config.dram_bytes, config.remote) == (3 << 30, "memory://x")
    assert config.engine_args == ("--tp-size", "2") and not config.poison_kv
    profile.write_text("prefil: {}\n")
    with pytest.raises(BadConfig, match="expected sections"):
        config_of("--role", "prefill", "--profile", str(profile))
    profile.write_text("reader: {dram: 1}\n")
    with pytest.raises(BadConfig, match="reader: unknown key 'dram'"):
        config_of("--role", "reader", "--profile", str(profile))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--join", "http://g:1", "--cluster-secret-file", "/s"], "--role is needed"),
        (["--role", "reader", "--cluster-secret-file", "/s"], "--join is needed"),
        (["--role", "reader", "--join", "g:1", "--cluster-secret-file", "/s"], "such as http"),
        (["--role", "reader", "--join", "http://g:1"], "--cluster-secret-file is needed"),
        ([*ARGV, "--role", "reader", "--name", "a b"], "--name a b"),
        ([*ARGV, "--role", "both"], "--role both"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(flags, words):
    with pytest.raises(BadConfig, match=words):
        load_config(flags)


def test_a_node_listens_where_it_is_told_and_is_known_by_its_address(tmp_path):
    config = config_of("--role", "prefill", "--bind-host", "0.0.0.0")
    layout = node_layout(config, MODEL, CPU, "10.0.0.7")
    agent, engine = node_records(layout, SECRET, JOINED)
    told = node_members(layout, SECRET)
    of_agent = AgentConfig.from_env(environment_of(agent, tmp_path))
    of_engine = EngineConfig.from_env(environment_of(engine, tmp_path))
    assert told.agent is not None
    assert of_agent.control == "tcp://0.0.0.0:30100" and of_agent.host == "10.0.0.7"
    assert told.agent.control == "tcp://10.0.0.7:30100"
    assert of_engine.agents == {**JOINED.agents, "agent-p7": told.agent.control}
    assert of_agent.engines == ["d0", "p7"]
    [address] = told.engines
    assert (address.role, address.agent, address.bootstrap_host) == (
        "prefill",
        "agent-p7",
        "10.0.0.7",
    )
    assert address.http.startswith("http://10.0.0.7:")
    assert address.control.startswith("tcp://10.0.0.7:")
    assert of_engine.controls == [address.control.replace("10.0.0.7", "0.0.0.0")]
    assert {check.target.split(":")[1] for check in engine.ready} == {"//127.0.0.1"}
    assert engine.env["SGLANG_HOST_IP"] == "10.0.0.7"
    assert engine.argv[engine.argv.index("--host") + 1] == "0.0.0.0"


def test_a_reader_is_an_agent_alone():
    layout = node_layout(config_of("--role", "reader"), MODEL, CPU, "10.0.0.7")
    [agent] = node_records(layout, SECRET, JOINED)
    assert agent.kind == "agent"
    assert node_members(layout, SECRET).engines == []
    assert alike(config_of("--role", "reader"), MODEL, CPU).keys() == {"protocol", "--transfer"}


SPANS = ["--nnodes", "2", "--dist-init-addr", "10.0.0.7:29400", "--prefill-args", "--tp 16"]


def test_each_host_of_an_engine_runs_its_own_part_of_it(tmp_path):
    layouts, engines, told = [], [], []
    for rank, host in enumerate(("10.0.0.7", "10.0.0.8")):
        config = config_of("--role", "prefill", *SPANS, "--node-rank", str(rank))
        layout = node_layout(
            config, MODEL, Hardware("cuda", "tcp", "test", gpus=8), host, "10.0.0.7"
        )
        agent, engine = node_records(layout, SECRET, JOINED)
        assert (agent.host, engine.host, engine.together) == (host, host, "p7")
        assert layout.gpus(engine.name) == list(range(8))
        layouts.append(layout)
        engines.append(engine)
        told.append(node_members(layout, SECRET))
    assert [engine.name for engine in engines] == ["p7", "p7-1"]
    for rank, engine in enumerate(engines):
        argv = engine.argv
        assert argv[argv.index("--node-rank") + 1] == str(rank)
        assert argv[len(argv) - argv[::-1].index("--dist-init-addr")] == "10.0.0.7:29400"
        assert EngineConfig.from_env(environment_of(engine, tmp_path)).name == "p7"
    ports = {e.argv[e.argv.index("--disaggregation-bootstrap-port") + 1] for e in engines}
    assert len(ports) == 1
    assert [address.name for address in told[0].engines] == ["p7"] and told[1].engines == []
    assert told[1].agent is not None and told[1].agent.name == "agent-p7-1"
    of_second = EngineConfig.from_env(environment_of(engines[1], tmp_path))
    assert of_second.agent == "agent-p7-1" and "agent-d0" in of_second.agents


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nnodes", "2"], "needs --dist-init-addr"),
        ([*SPANS, "--node-rank", "2"], "below --nnodes 2"),
        ([*SPANS, "--name", ""], "needs --name"),
        ([*SPANS, "--role", "reader"], "a reader has no engine"),
    ],
)
def test_hosts_of_an_engine_are_named_in_full(flags, words):
    with pytest.raises(BadConfig, match=words):
        config_of("--role", "prefill", *flags)


def test_more_gpus_than_this_host_has_are_refused():
    config = config_of("--role", "decode", "--decode-args", "--tp-size 8")
    node_layout(config, MODEL, Hardware("cuda", "rdma", "test", gpus=8), "10.0.0.7")
    with pytest.raises(BadConfig, match="need 8 GPUs, and this machine shows 4"):
        node_layout(config, MODEL, Hardware("cuda", "rdma", "test", gpus=4), "10.0.0.7")


async def test_the_first_hosts_name_may_come_later(monkeypatch):
    monkeypatch.setattr(address, "RESOLVE_AGAIN_S", 0.01)
    answers = ["", "", "10.0.0.7"]

    def resolved(name: str) -> str:
        assert name == "p7-0.pods"
        if answer := answers.pop(0):
            return answer
        raise OSError(0, "not known")

    monkeypatch.setattr(address, "_resolved", resolved)
    assert await address.first_host("p7-0.pods:29400", 60) == "10.0.0.7"
    answers = [""]
    with pytest.raises(BadConfig, match="p7-0.pods: not known"):
        await address.first_host("p7-0.pods:29400", -1)


def test_addresses_are_this_hosts(monkeypatch):
    monkeypatch.delenv("SGLANG_HOST_IP", raising=False)
    assert own_address("", ["http://127.0.0.1:30000"]) == "127.0.0.1"
    assert own_address("localhost", ["http://10.0.0.1:30000"]) == "127.0.0.1"
    monkeypatch.setenv("SGLANG_HOST_IP", "127.0.0.9")
    assert own_address("", ["http://10.0.0.1:30000"]) == "127.0.0.9"
    with pytest.raises(BadConfig, match="address of this host"):
        own_address("192.0.2.77", ["http://127.0.0.1:30000"])
    assert network_of("127.0.0.1") == "127.0.0.0/8"
    assert network_of("192.0.2.77") == "192.0.2.77"
