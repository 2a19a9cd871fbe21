"""Who lives and who dies, on one host with Ray and stand-ins for SGLang: a worker of Ray's, the
driver, a node too many."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.testbed.network import entered
from tests.cluster import Cluster, get
from tests.control import SECRET
from tests.launch.node.stand_in import install
from tests.launch.ray.hosts import RayHosts, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.whole,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"
    ),
]

PROFILE = """
all: {model: org/stub, device: cpu, transfer: tcp, dram-bytes: 1MiB, ssd-bytes: 0, log-dir: LOGS}
pools: {prefill: {cpus: 0.5}, decode: {cpus: 0.5}, reader: {cpus: 0.5, count: 0}}
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[RayHosts]:
    hosts = RayHosts({"a": "any"}, tmp_path)
    hosts.env |= {"PYTHONPATH": install(tmp_path)["PYTHONPATH"]}
    (tmp_path / "hosts.yaml").write_text(PROFILE.replace("LOGS", str(tmp_path / "logs")))
    try:
        hosts.build()
        with entered(hosts.network.namespace("a")):  # where operators are heard
            hosts.start_ray("a")
            yield hosts
    finally:
        hosts.remove()


def driver(hosts: RayHosts) -> Cluster:
    process = hosts.driver(f"--hosts={hosts.folder / 'hosts.yaml'}")
    return Cluster(process, f"http://{hosts.address('a')}:30000", hosts.folder)


def wait_living(cluster: Cluster, hosts: RayHosts, *names: str) -> dict[str, int]:
    def living() -> dict[str, int]:
        return cluster.incarnations("agents") | cluster.incarnations("engines")

    try:
        cluster.wait_until(lambda: living().keys() == set(names), 120, "all are there")
    except (TimeoutError, RuntimeError) as error:
        raise AssertionError(f"{error}\n{hosts.said()[-6000:]}") from None
    return living()


def node(hosts: RayHosts, name: str) -> psutil.Process:
    [pid] = hosts.pids("a", f"launch.node --join=http://{hosts.address('a')}:30000 --role={name}")
    return psutil.Process(pid)


def has_ended(process: psutil.Process) -> bool:
    """Nobody may have waited for it yet."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_fates(hosts: RayHosts) -> None:
    cluster = driver(hosts)
    everyone = ("agent-p0", "agent-d0", "p0", "d0")
    before = wait_living(cluster, hosts, *everyone)

    # Ray's worker is killed: its node drains, and is started anew once that has ended.
    old = node(hosts, "decode")
    old.parent().kill()
    until(lambda: has_ended(old), hosts.said)
    until(lambda: "d0 | lost: " in hosts.said(), hosts.said)
    cluster.wait_until(
        lambda: cluster.incarnations("engines").get("d0", 0) > before["d0"], 120, "d0 is back"
    )

    # The driver is killed, and what was ordered meanwhile is done by the next one.
    running = node(hosts, "prefill").pid
    hosts.kill("a", "launch.cluster")
    cluster.process.wait(60)
    assert get(f"{cluster.url}/health")[0] == 200
    order = subprocess.Popen(hosts.scale_command("--reader=+1"), env=hosts.env)
    cluster = driver(hosts)
    assert order.wait(120) == 0, hosts.said()
    after = wait_living(cluster, hosts, *everyone, "agent-r0")
    assert after["p0"] == before["p0"] and node(hosts, "prefill").pid == running
    hosts.scale("--reader=-1")
    wait_living(cluster, hosts, *everyone)

    for pid in hosts.pids("a", "launch.cluster"):
        os.kill(pid, signal.SIGTERM)
    assert cluster.process.wait(120) == 0, hosts.said()
    assert hosts.left() == []
    assert SECRET not in hosts.said()
