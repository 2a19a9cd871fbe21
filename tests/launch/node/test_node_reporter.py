"""The file that says whether a node serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.node.config import load_config
from launch.node.reporter import NodeReporter

NODE = ["--join", "http://10.0.0.1:30000", "--role", "decode", "--cluster-secret-file", "secret"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ready"


@pytest.fixture
def reporter(file: Path) -> NodeReporter:
    file.touch()  # of a node that was killed
    config = load_config([*NODE, "--ready-file", str(file)])
    return NodeReporter(config, ["agent-d0", "d0"])


def test_it_is_there_while_all_processes_are_ready(reporter: NodeReporter, file: Path):
    assert not file.exists()
    reporter.ready("agent-d0", 1.0)
    assert not file.exists()
    reporter.ready("d0", 2.0)
    assert file.exists()
    reporter.restarting("agent-d0", "exited with code 1", 1.0)
    assert not file.exists()
    reporter.ready("agent-d0", 1.0)
    assert file.exists()


def test_a_node_that_drains_is_not_ready_whatever_its_processes_are(reporter, file: Path):
    for name in ("agent-d0", "d0"):
        reporter.ready(name, 1.0)
    reporter.stopping("SIGTERM received")
    reporter.ready("d0", 1.0)
    assert not file.exists()
