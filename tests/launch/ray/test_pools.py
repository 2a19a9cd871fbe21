"""Profiles of pools, and the commands that become of them; without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cluster.config import ClusterConfig, load_config
from launch.flags.gateway import GatewayCommand
from launch.node import config as node_config
from launch.node.config import NodeConfig
from launch.ray.commands import SECRET_FILE, Commands, HostCommand
from launch.ray.profile import Profile, load_pools, plain_profile
from launch.settings import BadConfig, load_settings, make_parser

PROFILE = """
all: {model: tiny, dram-bytes: 1GiB, remote: s3://bucket/kv}
prefill: {dram-bytes: 2GiB}
pools:
  gateway: {labels: {front: "yes"}}
  prefill: {count: 2, gpus: 8, labels: {kind: big}}
  decode:
  wide: {role: decode, nnodes: 2, settings: {decode-args: --tp-size 4, dram-bytes: 3GiB}}
  reader: {count: 0}
"""
URL = "http://10.0.0.1:30000"


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    path = tmp_path / "cluster.yaml"
    path.write_text(PROFILE)
    return load_pools(path)


def config(*flags: str) -> ClusterConfig:
    return load_config(["--ray", *flags])


def read_back(command: HostCommand) -> NodeConfig:
    """By the parser of the program that is started."""
    return load_settings(NodeConfig, node_config.make_parser(), command.flags)


def test_pools_say_how_many_and_where(profile):
    assert [(name, pool.role, pool.count) for name, pool in profile.pools.items()] == [
        ("gateway", "gateway", 1),
        ("prefill", "prefill", 2),
        ("decode", "decode", 1),
        ("wide", "decode", 1),
        ("reader", "reader", 0),
    ]
    assert profile.pools["prefill"].bundle == {"CPU": 1.0, "GPU": 8.0}
    assert profile.names("prefill") == ["p0", "p1"] and profile.names("wide") == ["wide-0"]


def test_new_nodes_take_the_lowest_free_names_and_the_last_ones_go(profile):
    taken = frozenset({"p1", "p3", "d0"})
    assert profile.names("prefill", taken) == ["p1", "p3"]
    more = profile.scaled({"prefill": "+2"})
    assert more.names("prefill", taken) == ["p1", "p3", "p0", "p2"]
    assert profile.scaled({"prefill": "1"}).names("prefill", taken) == ["p1"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"decode": "-2"}, "there are 1"),
        ({"reader": "-1"}, "there are 0"),
        ({"prefill": "many"}, "give a number"),
        ({"fast": "1"}, "0 pools"),
    ],
)
def test_a_change_that_cannot_be_is_refused(profile, change, words):
    with pytest.raises(BadConfig, match=words):
        profile.scaled(change)


def test_a_node_gets_the_settings_of_all_its_role_its_pool_and_the_command(profile):
    commands = Commands(config("--max-total-tokens=4096"))
    [command] = commands.node(profile, "p1", [URL], ["10.0.0.2"])
    node = read_back(command)
    assert (node.name, node.role, node.join, node.host) == ("p1", "prefill", (URL,), "10.0.0.2")
    assert (node.model, node.remote, node.dram_bytes) == ("tiny", "s3://bucket/kv", 2 << 30)
    assert node.max_total_tokens == 4096 and node.cluster_secret_file == SECRET_FILE


def test_hosts_of_an_engine_meet_at_the_first_and_have_the_same_ports(profile):
    commands = Commands(config()).node(profile, "wide-0", [URL], ["10.0.0.2", "10.0.0.3"])
    first, second = map(read_back, commands)
    assert (first.nnodes, first.node_rank, second.node_rank) == (2, 0, 1)
    assert (first.name, second.node) == ("wide-0", "wide-0-1")
    assert first.base_port == second.base_port == 30100
    host, _, port = first.dist_init_addr.partition(":")
    own = range(commands[0].first_port, commands[0].first_port + commands[0].ports)
    assert first.dist_init_addr == second.dist_init_addr and host == "10.0.0.2"
    assert int(port) in own and int(port) + 13 in own


def test_nodes_of_one_host_have_ports_of_their_own(profile):
    commands = Commands(config("--base-port=20000"))
    taken: list[range] = []
    for name in ("p0", "p1", "d0", "wide-0"):
        addresses = ["10.0.0.2", "10.0.0.3"] if name == "wide-0" else ["10.0.0.2"]
        command = commands.node(profile, name, [URL], addresses, taken)[0]
        taken.append(range(command.first_port, command.first_port + command.ports))
    starts = sorted(ports.start for ports in taken)
    assert starts[0] == 20000 and starts == [ports.start for ports in taken]
    assert all(a.stop <= b.start for a, b in zip(taken, taken[1:], strict=False))


def test_the_gateway_listens_where_it_is_placed(profile):
    commands = Commands(config("--port=31000", "--path-policy=n-way"))
    assert commands.url("10.0.0.1") == "http://10.0.0.1:31000"
    command = commands.gateway("g0", "10.0.0.1", [URL])
    parser = make_parser(GatewayCommand, "gateway", "")
    gateway = load_settings(GatewayCommand, parser, command.flags)
    assert (gateway.host, gateway.port, gateway.path_policy) == ("10.0.0.1", 31000, "n-way")
    assert gateway.standby_of == ()
    everywhere = Commands(config("--host=0.0.0.0")).gateway("g0", "10.0.0.1", [URL])
    assert "--host=0.0.0.0" in everywhere.flags


def test_secrets_are_on_no_command_line(profile):
    commands = Commands(config("--remote=s3://b/k", '--remote-options={"key": "hush"}'))
    [command] = commands.node(profile, "d0", [URL], ["10.0.0.2"])
    assert "hush" not in str(command.flags)
    assert "hush" in commands.secrets(profile, "d0")["DUALPATH_REMOTE_OPTIONS"]


def test_the_same_file_is_a_profile_of_nodes_started_by_hand(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(PROFILE)
    assert node_config.read_profile(path, "prefill")["dram_bytes"] == 2 << 30


@pytest.mark.parametrize(
    "text, words",
    [
        ("all: {}", "expected a section `pools`"),
        ("pools: {fast: {count: 1}}", "role 'fast'"),
        ("pools: {decode: {hosts: 2}}", "unknown field"),
        ("pools: {decode: {count: -1}}", "count"),
        ("pools: {reader: {nnodes: 2}}", "only engines"),
        ("pools: {decode: {role: prefill}}", "name it otherwise"),
        ("pools: {gateway: {count: 0}}", "one at least"),
        ("pools: {decode: {settings: {dram-byte: 1}}}", "Did you mean"),
        ("pools: {Decode: {}}", "small letters"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(tmp_path, text, words):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(BadConfig, match=words):
        load_pools(path)


def test_engines_that_cannot_be_are_refused_before_anything_is_placed(profile):
    with pytest.raises(BadConfig, match="must divide"):
        Commands(config("--decode-args=--tp-size 3")).check(profile)


def test_without_a_file_there_are_as_many_engines_as_the_flags_say():
    profile = plain_profile(prefill=1, decode=2)
    assert [profile.names(pool) for pool in ("prefill", "decode")] == [["p0"], ["d0", "d1"]]


def test_hosts_are_rays():
    with pytest.raises(BadConfig, match="--ray"):
        load_config(["--hosts=x"])
