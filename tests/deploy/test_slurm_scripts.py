"""The scripts for Slurm start what they say, and start it again: with stand-ins for Slurm's
commands and for the programs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from common.user_files import write_private
from launch.node.config import NodeConfig, load_config

SCRIPTS = Path(__file__).parents[2] / "deploy" / "slurm"
JOIN = "http://10.0.0.1:30000"
HOSTS = [f"gpu-{n}.site" for n in range(8)]
ADDRESSES = [f"10.0.0.{n + 1}" for n in range(8)]
TIMEOUT_S = 20


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def node(folder: Path, place: int, *flags: str, **counts: int) -> NodeConfig:
    """What the host of a place in the job runs."""
    write_private(folder / "secret", b"5" * 64)
    executable(folder / "scontrol", "printf '%s\\n' " + " ".join(HOSTS))
    python = executable(folder / "python", 'printf "%s\\n" "$@"')
    numbers = {"PREFILL": 1, "DECODE": 1, "PREFILL_HOSTS": 1, "DECODE_HOSTS": 1, **counts}
    env = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        **{name: str(value) for name, value in numbers.items()},
        "SLURM_NODEID": str(place),
        "SLURM_JOB_NODELIST": "gpu-[0-7].site",
        "ADDRESSES": " ".join(ADDRESSES),
        "JOIN": JOIN,
        "SECRET": str(folder / "secret"),
        "PYTHON": str(python),
        "DRAIN_TIMEOUT_S": "90",
    }
    done = subprocess.run(
        [SCRIPTS / "node.sh", *flags], env=env, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.stderr == ""
    module, *argv = done.stdout.splitlines()[1:]
    assert module == "launch.node"
    return load_config(argv)


def test_hosts_of_a_job_are_prefill_then_decode_then_readers(tmp_path: Path):
    nodes = [node(tmp_path, place, PREFILL=2, DECODE=3) for place in range(8)]
    assert [n.role for n in nodes] == ["prefill"] * 2 + ["decode"] * 3 + ["reader"] * 3
    assert [n.name for n in nodes] == [f"gpu-{i}_site" for i in range(8)]
    assert [n.host for n in nodes] == ADDRESSES
    assert {n.join for n in nodes} == {(JOIN,)}
    assert {n.drain_timeout_s for n in nodes} == {90.0}
    assert {n.nnodes for n in nodes} == {1}


def test_hosts_of_an_engine_meet_at_its_first(tmp_path: Path):
    counts = {"PREFILL": 1, "PREFILL_HOSTS": 3, "DECODE": 2, "DECODE_HOSTS": 2}
    nodes = [node(tmp_path, place, **counts) for place in range(8)]
    assert [(n.role, n.name, n.node_rank, n.nnodes) for n in nodes] == [
        ("prefill", "gpu-0_site", 0, 3),
        ("prefill", "gpu-0_site", 1, 3),
        ("prefill", "gpu-0_site", 2, 3),
        ("decode", "gpu-3_site", 0, 2),
        ("decode", "gpu-3_site", 1, 2),
        ("decode", "gpu-5_site", 0, 2),
        ("decode", "gpu-5_site", 1, 2),
        ("reader", "gpu-7_site", 0, 1),
    ]
    assert [n.dist_init_addr for n in nodes[3:7]] == [
        "10.0.0.4:29400",
        "10.0.0.4:29400",
        "10.0.0.6:29400",
        "10.0.0.6:29400",
    ]


def test_the_address_of_a_host_is_that_of_its_device():
    def address(**env: str) -> str:
        env = {"PATH": os.environ["PATH"], **env}
        return subprocess.run(
            [SCRIPTS / "address.sh"], env=env, capture_output=True, text=True, timeout=TIMEOUT_S
        ).stdout

    assert address(GLOO_SOCKET_IFNAME="lo") == "127.0.0.1\n"
    assert address(GLOO_SOCKET_IFNAME="lo", SGLANG_HOST_IP="10.0.0.9") == "10.0.0.9\n"
    assert address() == f"{socket.gethostbyname(socket.gethostname())}\n"


def test_arguments_of_the_job_are_every_nodes(tmp_path: Path):
    config = node(tmp_path, 1, "--engine-args", "--tp-size 8", "--ssd-dir", "/nvme")
    assert config.engine_args == ("--tp-size", "8") and config.ssd_dir == (Path("/nvme"),)


def test_a_job_of_too_few_hosts_says_so(tmp_path: Path):
    env = {**os.environ, "PREFILL": "2", "DECODE_HOSTS": "2", "SLURM_JOB_NUM_NODES": "3"}
    done = subprocess.run(
        ["bash", SCRIPTS / "cluster.sbatch"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 2
    assert done.stderr == "error: the engines need 4 hosts, and the job has 3\n"


# ---- again.sh -----------------------------------------------------------------------------------


def again(folder: Path, command: str) -> subprocess.Popen[str]:
    own = executable(folder / "command", command)
    return subprocess.Popen(
        [SCRIPTS / "again.sh", own], cwd=folder, stderr=subprocess.PIPE, text=True
    )


def until(path: Path, text: str) -> None:
    give_up_at = time.monotonic() + TIMEOUT_S
    while not path.exists() or path.read_text() != text:
        assert time.monotonic() < give_up_at, path.exists() and path.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize("code", [0, 2])
def test_what_has_ended_for_good_is_not_started_again(tmp_path: Path, code: int):
    process = again(tmp_path, f"echo once >> starts; exit {code}")
    assert process.communicate(timeout=TIMEOUT_S)[1] == ""
    assert process.returncode == code
    assert (tmp_path / "starts").read_text() == "once\n"


def test_what_dies_is_started_again(tmp_path: Path):
    process = again(tmp_path, "echo x >> starts; [ $(wc -l < starts) = 2 ] || kill -9 $$")
    said = process.communicate(timeout=TIMEOUT_S)[1]
    assert process.returncode == 0
    assert "command ended with 137; once more in 1 s" in said
    assert (tmp_path / "starts").read_text() == "x\n" * 2


def test_signals_are_passed_on_once_and_it_may_end_in_peace(tmp_path: Path):
    process = again(
        tmp_path,
        "trap 'printf T >> told' TERM; printf x > up\n"
        "until [ -e go ]; do sleep 0.05; done; printf done >> told",
    )
    until(tmp_path / "up", "x")
    process.send_signal(signal.SIGTERM)
    until(tmp_path / "told", "T")
    process.send_signal(signal.SIGTERM)  # as Slurm does beside our own
    (tmp_path / "go").touch()
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert (tmp_path / "told").read_text() == "Tdone"


def test_a_signal_between_two_starts_ends_it(tmp_path: Path):
    process = again(tmp_path, "printf x >> starts; exit 1")
    assert process.stderr is not None
    assert "once more" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert (tmp_path / "starts").read_text() == "x"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_the_scripts_are_well_written():
    subprocess.run(["shellcheck", *SCRIPTS.iterdir()], check=True, timeout=TIMEOUT_S)
