"""A job without --endpoint: the cluster that it starts ends with it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from launch.access import Access
from launch.rollout.config import load_config
from launch.settings import BadConfig
from tests.common.ports import free_port
from tests.launch.rollout import stub as rollout_stub
from tests.launch.rollout.jobs import keys, samples, text_rows, wait_until, write_jsonl

JOB = """
import sys, types
from launch.rollout import own_cluster
own_cluster.sys = types.SimpleNamespace(executable=sys.argv.pop(1))
from launch.rollout.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
CLUSTER = """#!/bin/sh
echo "$@" > {flags}
for flag; do case $flag in --port=*) port=${{flag#--port=}};; esac; done
exec {command} $port
"""


def start_job(folder: Path, cluster: str, *flags: str) -> subprocess.Popen[str]:
    """A job whose ``launch.cluster`` is the command ``cluster``, which gets the port."""
    launcher = folder / "launcher"
    launcher.write_text(CLUSTER.format(flags=folder / "flags", command=cluster))
    launcher.chmod(0o755)
    source = write_jsonl(folder / "in.jsonl", text_rows(40))
    command = [sys.executable, "-c", JOB, str(launcher), "--input", str(source)]
    command += ["--output", str(folder / "out"), "--concurrency", "4", *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def is_served(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "end",
    [None, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGTERM, signal.SIGKILL))],
)
def test_its_cluster_ends_with_it(tmp_path, end):
    port = free_port()
    stub = f"{sys.executable} -m {rollout_stub.__name__}"
    job = start_job(tmp_path, stub, f"--port={port}", "--decode=2")
    if end is not None:
        wait_until(lambda: is_served(port))
        os.kill(job.pid, end)
    _, text = job.communicate(timeout=30)
    assert job.returncode == {None: 0, signal.SIGTERM: 130, signal.SIGKILL: -9}[end], text
    wait_until(lambda: not is_served(port), 5)
    given = (tmp_path / "flags").read_text().split()
    assert given[:2] == ["-m", "launch.cluster"]
    assert {f"--port={port}", "--decode=2"} == set(given[2:])
    if end is None:
        assert keys(tmp_path / "out") == [(row, 0) for row in range(40)]
        assert samples(tmp_path / "out")[0]["finish_reason"] in ("stop", "length")


@pytest.mark.slow
def test_a_cluster_that_does_not_start_says_why(tmp_path):
    job = start_job(tmp_path, "sh -c 'echo no such model; exit 1'", f"--port={free_port()}")
    _, text = job.communicate(timeout=30)
    assert job.returncode == 2
    assert "no such model" in text and "cluster.log" in text


def test_a_key_goes_with_an_endpoint_and_is_on_no_command_line():
    own = ["--input", "x", "--output", "y"]
    there = [*own, "--endpoint", "https://kv.example:30000", "--api-key", "hush"]
    assert load_config(there).access == Access("hush")
    for flags in (["--decode", "2"], ["--admin-api-key", "hush"]):
        with pytest.raises(BadConfig, match="with --endpoint") as error:
            load_config([*there, *flags])
        assert "hush" not in str(error.value)
    config = load_config([*own, "--api-key", "hush", "--decode", "2"])
    assert config.cluster_flags() == ["--decode=2"]
    assert "hush" in config.cluster_secrets()["DUALPATH_API_KEY"]
    assert config.access.any_name, "its own cluster's certificate is known by itself"
