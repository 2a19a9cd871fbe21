"""Commands and files of ``docs/deploy.md`` are such as the programs take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from common.cluster.membership import Role
from common.user_files import write_private
from launch.cluster import config as cluster_config
from launch.flags.gateway import lone_gateway
from launch.node.config import load_config
from launch.ray.commands import Commands
from launch.ray.profile import load_pools
from launch.scale import ScaleSettings
from launch.settings import load_settings, make_parser

PAGE = (Path(__file__).parents[3] / "docs" / "deploy.md").read_text()

PROFILES = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
"""For nodes started by hand, and for Ray."""


def commands(module: str) -> list[list[str]]:
    lines = re.findall(rf"^\.venv/bin/python -m {re.escape(module)} (.*)$", PAGE, re.M)
    return [shlex.split(line) for line in lines]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_private(tmp_path / "cluster.secret", b"s" * 32)
    return tmp_path


def test_every_command_is_taken():
    gateways = [lone_gateway(argv) for argv in commands("launch.gateway")]
    assert [gateway.host for gateway in gateways] == ["0.0.0.0", "127.0.0.1", "0.0.0.0"]
    assert [len(gateway.standby_of) for gateway in gateways] == [0, 0, 2]
    nodes = [load_config(argv) for argv in commands("launch.node")]
    assert {node.role for node in nodes} == {role.value for role in Role}
    ports = [node.first_port for node in nodes if "127.0.0.1" in node.join[0]]
    assert len(ports) == len(set(ports)) == 2, "nodes of one machine have ports of their own"


@pytest.mark.parametrize("role", list(Role))
def test_the_profile_is_taken_for_every_role(folder, role):
    profile, _ = PROFILES
    (folder / "profile.yaml").write_text(profile)
    argv = [*commands("launch.node")[0], "--profile", "profile.yaml", "--role", role.value]
    config = load_config(argv)
    assert config.model == "/models/Qwen3-8B" and config.prefill_args == ("--tp-size", "8")


def test_what_ray_is_to_start_is_taken(folder):
    (folder / "hosts.yaml").write_text(PROFILES[1])
    [argv] = commands("launch.cluster")
    config = cluster_config.load_config(argv)
    profile = load_pools(Path(config.hosts))
    Commands(config).check(profile)
    scaled = [scale_settings(argv).order().changes for argv in commands("launch.scale")]
    assert scaled == [{"decode": "+1"}, {"decode": "-1"}]
    assert all(profile.scaled(changes) for changes in scaled)


def scale_settings(argv: list[str]) -> ScaleSettings:
    return load_settings(ScaleSettings, make_parser(ScaleSettings, "scale", ""), argv)
