"""No cluster departs from the product without being told to, and without saying so."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from benchmarks.testbed.oracle import ORACLE_CLASS
from common.experiment import NO_EXPERIMENT, Experiment
from engine.config import EngineConfig
from launch.cluster.config import ClusterConfig, load_config
from launch.cluster.console import make_summary
from launch.cluster.hardware import Hardware
from launch.cluster.processes import process_records
from launch.settings import BadConfig
from transfer.agent.config import AgentConfig

TCP = Hardware("cpu", "tcp", "test")
MODEL = Path("/models/tiny")


def experiments_of(config: ClusterConfig) -> dict[str, Experiment]:
    records = {record.name: record for record in process_records(config, MODEL, TCP)}
    engines = {name: EngineConfig.from_env(records[name].env).experiment for name in ("p0", "d0")}
    return engines | {"agent-p0": AgentConfig.from_env(records["agent-p0"].env).experiment}


def summary_of(config: ClusterConfig) -> dict[str, str]:
    columns = make_summary(config, TCP, MODEL, []).columns
    names, texts = ([str(cell) for cell in columns[number].cells] for number in (0, 2))
    return dict(zip(names, texts, strict=True))


def test_a_cluster_has_none_by_itself(tmp_path, caplog):
    assert set(experiments_of(ClusterConfig()).values()) == {NO_EXPERIMENT}
    assert "EXPERIMENT" not in summary_of(ClusterConfig())
    NO_EXPERIMENT.announce(logging.getLogger())
    assert not caplog.records
    file = tmp_path / "c.yaml"
    for key in ("experiment: {zero_io: true}", "zero-io: true", "keep-prefixes: false"):
        file.write_text(key)
        with pytest.raises(BadConfig, match="unknown key"):
            load_config(["--config", str(file)])


def test_noise_in_the_engines_pools_is_said(caplog):
    config = load_config(["--poison-kv"])
    noise = Experiment(poison_kv=True)
    wanted = {"p0": noise, "d0": noise, "agent-p0": NO_EXPERIMENT}
    assert experiments_of(config) == wanted
    assert "poison_kv=True" in summary_of(config)["EXPERIMENT"]
    noise.announce(logging.getLogger())
    assert "EXPERIMENT" in caplog.text and "poison_kv=True" in caplog.text


def test_plans_without_reads_are_said_and_known_to_every_process():
    config = load_config(["--path-policy", ORACLE_CLASS])
    assert "zero_io=True" in summary_of(config)["EXPERIMENT"]
    assert set(experiments_of(config).values()) == {Experiment(zero_io=True)}
    with pytest.raises(BadConfig):
        load_config(["--path-policy", "oracle"])
