"""A gateway that is started by hand, for nodes to join."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.flags.gateway import lone_gateway
from launch.settings import BadConfig
from transfer.control.keys import ENGINE_HTTP, derived

SECRET = "s" * 32


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(descriptor, SECRET.encode())
    os.close(descriptor)
    return file


def test_it_knows_nobody_but_the_secret_of_those_who_may_join(secret_file):
    argv = ["--host", "10.0.0.1", "--port", "31000", "--path-policy", "split"]
    config = lone_gateway([*argv, f"--cluster-secret-file={secret_file}"])
    assert (config.host, config.port, config.path_policy) == ("10.0.0.1", 31000, "split")
    assert (config.agents, config.engines, config.control_secret) == ({}, [], SECRET)
    assert config.keys.engine_key == derived(SECRET, ENGINE_HTTP)


def test_without_the_secret_it_does_not_start(secret_file):
    with pytest.raises(BadConfig, match="cluster-secret-file is needed"):
        lone_gateway([])
    secret_file.chmod(0o644)
    with pytest.raises(BadConfig, match="open to others"):
        lone_gateway([f"--cluster-secret-file={secret_file}"])
