"""A cluster as a job of Slurm's: what the scripts of ``deploy/slurm`` make of a real one."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.cluster import GREEDY, Cluster, free_port_block, get, post, prompt, shared_plain
from tests.deploy import slurm as own_slurm
from tests.deploy.slurm import Slurm, running_slurm

ROOT = Path(__file__).parents[2]
SCRIPT = "deploy/slurm/cluster.sbatch"
START_TIMEOUT_S, BACK_TIMEOUT_S, END_TIMEOUT_S = 240, 60, 120
NODE_PORTS = 130
FIRST_TOKENS = 700
FIRST = prompt(FIRST_TOKENS, seed=1)
LONG = {**GREEDY, "max_new_tokens": 300}
Plain = Callable[..., list[int]]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.whole,
    pytest.mark.timeout(500),
    pytest.mark.skipif(
        bool(own_slurm.missing()),
        reason=f"needs Slurm (make setup-test): no {', '.join(own_slurm.missing())}",
    ),
]


@pytest.fixture
def ports() -> range:
    """The gateway's, four nodes', and after them Slurm's."""
    first = free_port_block(1 + 4 * NODE_PORTS + own_slurm.PORTS)
    return range(first, first + 1 + 4 * NODE_PORTS)


@pytest.fixture
def plain() -> Plain:
    return shared_plain()


@pytest.fixture
def slurm(tmp_path: Path, ports: range) -> Iterator[Slurm]:
    with running_slurm(tmp_path / "slurm", ports.stop) as slurm:
        yield slurm


@pytest.fixture
def checkout(tmp_path: Path, ports: range) -> Path:
    """The project's folder as a user submits from it, and a profile for nodes of one machine."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for entry in ROOT.iterdir():
        if entry.name != ".venv":
            (folder / entry.name).symlink_to(entry)
    (folder / ".venv").symlink_to(sys.prefix)
    everyone = {
        "model": "tiny",
        "device": "cpu",
        "transfer": "tcp",
        "poison-kv": True,
        "dram-bytes": "64MiB",
        "ssd-bytes": 0,
        "remote": (tmp_path / "remote").as_uri(),
        "max-total-tokens": 20480,
        "log-dir": str(tmp_path / "logs"),
    }
    of_role = {
        role: {"base-port": ports.start + 1 + number * NODE_PORTS}
        for number, role in enumerate(("prefill", "decode", "reader"))
    }
    (folder / "profile.yaml").write_text(yaml.safe_dump({"all": everyone, **of_role}))
    return folder


class Job:
    """One of Slurm's, of so many hosts, whose nodes have these flags too."""

    def __init__(self, slurm: Slurm, checkout: Path, hosts: int, *flags: str, **env: str) -> None:
        argv = [f"--nodes={hosts}", SCRIPT, "--profile", "profile.yaml", *flags]
        # The loopback is the network of these hosts.
        self.id, self.process = slurm.submit(checkout, argv, {"GLOO_SOCKET_IFNAME": "lo", **env})
        self.slurm = slurm
        self.checkout = checkout

    def processes(self) -> list[psutil.Process]:
        """Whatever has its environment, whoever its parent is by now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                of_job = process.environ().get("SLURM_JOB_ID") == self.id
                if of_job and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def node(self, name: str) -> psutil.Process:
        """``launch.node`` of a host."""
        (found,) = [
            process
            for process in self.processes()
            if {"launch.node", name} <= set(process.cmdline())
        ]
        return found

    def wait_gone(self) -> None:
        """Until nothing of it is left: Slurm says earlier that it has ended."""
        give_up_at = time.monotonic() + END_TIMEOUT_S
        while left := self.processes():
            assert time.monotonic() < give_up_at, (left, self.output())
            time.sleep(0.1)

    def shared_memory(self) -> set[str]:
        """Files that its processes have mapped."""
        maps = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                maps += [mapped.path for mapped in process.memory_maps()]
        return {path for path in maps if path.startswith("/dev/shm/")}

    def state(self) -> str:
        return self.slurm.ask("squeue", "--noheader", "--format=%T", f"--jobs={self.id}").strip()

    def output(self) -> str:
        return (self.checkout / f"dualpath-{self.id}.log").read_text()


def listened_to(ports: range) -> list[int]:
    found = []
    for port in ports:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                found.append(port)
    return found


def wait_for(cluster: Cluster, *hosts: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Until the gateway uses the agents of these, and no others."""
    names = {f"agent-{host}" for host in hosts}

    def there() -> bool:
        is_healthy = get(f"{cluster.url}/health")[0] == 200
        return is_healthy and cluster.incarnations("agents").keys() == names

    cluster.wait_until(there, timeout_s, f"{hosts} are there")


def drain(cluster: Cluster, on: bool, names: tuple[str, ...]) -> None:
    for name in names:
        post(f"{cluster.url}/admin/drain", {"name": name, "on": on})


def second_turn(cluster: Cluster, plain: Plain, drained: tuple[str, ...]) -> None:
    """Hits are read by an agent that is not drained, and tokens are plain SGLang's."""
    ids = FIRST + plain(FIRST) + prompt(30, seed=2)
    cluster.flush_engines()
    drain(cluster, True, drained)
    answer = cluster.generate(ids)
    drain(cluster, False, drained)
    assert answer.output_ids == plain(ids)
    assert answer.cached_tokens >= FIRST_TOKENS // 64 * 64, answer.trace
    assert answer.reader_agents.isdisjoint(drained)


def a_node_that_dies_is_started_again(cluster: Cluster, job: Job) -> None:
    """While the rest serves."""
    before = cluster.incarnations("agents")["agent-h3"]
    job.node("h3").kill()
    assert cluster.generate(FIRST).output_ids
    cluster.wait_until(
        lambda: cluster.incarnations("agents").get("agent-h3", 0) > before,
        BACK_TIMEOUT_S,
        "h3 is there again",
    )
    assert job.state() == "RUNNING"


def nodes_of_another_job_join_and_leave(cluster: Cluster, first: Job, *flags: str) -> None:
    secret = f"{first.checkout}/dualpath-{first.id}.secret"
    env = {"JOIN": cluster.url, "SECRET": secret, "PREFILL": "0", "DECODE": "0"}
    job = Job(first.slurm, first.checkout, 1, *flags, **env)
    wait_for(cluster, "h1", "h2", "h3", "h4", timeout_s=BACK_TIMEOUT_S)
    first.slurm.ask("scancel", job.id)
    job.wait_gone()
    wait_for(cluster, "h1", "h2", "h3", timeout_s=BACK_TIMEOUT_S)
    assert "not drained in time" not in job.output()


def the_job_ends_with_its_requests_answered(cluster: Cluster, job: Job) -> list[int]:
    """As before its time limit, at which Slurm sends the same signal to the same process."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        request = pool.submit(cluster.generate, FIRST, sampling_params=LONG)
        cluster.wait_until(lambda: cluster.state()["open_plans"] == 1, 30, "it is planned")
        job.slurm.ask("scancel", "--batch", f"--signal={signal.SIGTERM.value}", job.id)
        tokens = request.result(END_TIMEOUT_S).output_ids
    assert job.process.wait(END_TIMEOUT_S) == 0, job.output()
    assert "not drained in time" not in job.output()
    return tokens


def test_a_job_is_a_cluster_that_mends_itself_and_leaves_nothing(
    slurm: Slurm, checkout: Path, ports: range, plain: Plain
):
    job = Job(slurm, checkout, 3, PORT=str(ports.start), GATEWAY_ARGS="--load-policy always")
    cluster = Cluster(job.process, f"http://127.0.0.1:{ports.start}", checkout)
    wait_for(cluster, "h1", "h2", "h3")
    assert cluster.generate(FIRST).output_ids == plain(FIRST)
    cluster.wait_stored()
    second_turn(cluster, plain, ("agent-h1", "agent-h2"))
    a_node_that_dies_is_started_again(cluster, job)
    nodes_of_another_job_join_and_leave(
        cluster, job, f"--base-port={ports.stop - NODE_PORTS}", f"--log-dir={checkout}/more"
    )
    second_turn(cluster, plain, ())
    shared = job.shared_memory()
    assert the_job_ends_with_its_requests_answered(cluster, job) == plain(FIRST, **LONG)
    job.wait_gone()
    assert listened_to(ports) == []
    assert list(checkout.glob("*.secret")) == []
    assert not any(map(os.path.exists, shared))
