"""A cluster on several hosts, each started by hand: a gateway, a prefill node, a decode node and a
reader in network namespaces of their own. They join, serve the tokens of plain SGLang, drain, leave
nothing behind, come back, and outlive the gateway."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.testbed.network import Network, Rates, within
from common.user_files import write_private
from tests.cluster import GREEDY, Cluster, get, plain_tokens, post, prompt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"
    ),
]

NODES = {"p0": "prefill", "d0": "decode", "r0": "reader"}
PORT = 30000
BACK_TIMEOUT_S = 240
END_TIMEOUT_S = 120
EVERYONE = ("agent-p0", "agent-d0", "agent-r0", "p0", "d0")
FIRST_TOKENS = 700
FIRST = prompt(FIRST_TOKENS, seed=1)
LONG = {**GREEDY, "max_new_tokens": 300}


class Hosts:
    """The hosts, and what is started on them."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network = network
        self.folder = folder
        self.secret = folder / "secret"
        write_private(self.secret, b"s" * 32)
        self.started: list[subprocess.Popen[bytes]] = []

    def gateway(self) -> Cluster:
        """In the control namespace, where the test is, too."""
        process = self._start(
            "gateway",
            [],
            "launch.gateway",
            "--host=0.0.0.0",
            f"--port={PORT}",
            "--path-policy=n-way",
        )
        return Cluster(process, f"http://127.0.0.1:{PORT}", self.folder)

    def node(self, name: str) -> subprocess.Popen[bytes]:
        flags = ["--join", f"http://10.77.2.254:{PORT}", "--role", NODES[name], "--name", name]
        flags += [f"--host={self.network.compute_address(name)}", "--model=tiny", "--device=cpu"]
        flags += ["--transfer=tcp", "--poison-kv", "--dram-bytes=64MiB", "--ssd-bytes=0"]
        flags += [f"--remote={(self.folder / 'remote').as_uri()}", "--max-total-tokens=20480"]
        flags += [f"--log-dir={self.folder / name}"]
        where = within(self.network.namespace(name))
        return self._start(name, list(where), "launch.node", *flags)

    def processes(self, name: str) -> list[str]:
        listed = subprocess.run(
            ["ip", "netns", "pids", self.network.namespace(name)], capture_output=True, text=True
        )
        return listed.stdout.split()

    def _start(
        self, name: str, where: list[str], module: str, *flags: str
    ) -> subprocess.Popen[bytes]:
        argv = [*where, sys.executable, "-m", module, f"--cluster-secret-file={self.secret}"]
        with (self.folder / f"{name}.log").open("ab") as output:
            process = subprocess.Popen([*argv, *flags], stdout=output, stderr=output)
        self.started.append(process)
        return process

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait(END_TIMEOUT_S)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture
def hosts(folder: Path) -> Iterator[Hosts]:
    network = Network(list(NODES), Rates(storage_mbit=10_000, compute_mbit=10_000))
    network.build()
    hosts = Hosts(network, folder)
    try:
        with network.entered():
            yield hosts
    finally:
        hosts.end()
        network.remove()


@pytest.fixture
def plain(hosts: Hosts) -> Iterator[Callable[..., list[int]]]:
    with plain_tokens(hosts.folder) as generate:
        yield generate


def wait_for(cluster: Cluster, *names: str) -> None:
    """Until the gateway uses these, and nobody else."""

    def there() -> bool:
        state = cluster.state()
        living = {e["name"] for kind in ("agents", "engines") for e in state[kind] if e["alive"]}
        return living == set(names) and (
            not {"p0", "d0"} <= living or get(f"{cluster.url}/health")[0] == 200
        )

    cluster.wait_until(there, BACK_TIMEOUT_S, f"{names} are there")


def drain(cluster: Cluster, on: bool, *names: str) -> None:
    for name in names:
        post(f"{cluster.url}/admin/drain", {"name": name, "on": on})


def ended(hosts: Hosts, name: str, node: subprocess.Popen[bytes]) -> None:
    """After a drain: in good order, with nothing left."""
    assert node.wait(END_TIMEOUT_S) == 0, (hosts.folder / f"{name}.log").read_text()
    assert hosts.processes(name) == []


def wait_directory(cluster: Cluster) -> None:
    """Until the gateway knows the blocks of a prompt, which agents tell it."""
    cluster.wait_until(
        lambda: cluster.state()["directory_blocks"] >= FIRST_TOKENS // 64, 60, "blocks are known"
    )


def leave_while_serving(hosts: Hosts, cluster: Cluster, node: subprocess.Popen[bytes]) -> list[int]:
    """SIGTERM at the decode node while a request is under way; returns the request's tokens."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        request = pool.submit(cluster.generate, FIRST, sampling_params=LONG)
        cluster.wait_until(lambda: cluster.state()["open_plans"] == 1, 30, "it is planned")
        node.send_signal(signal.SIGTERM)
        tokens = request.result(END_TIMEOUT_S).output_ids
    ended(hosts, "d0", node)
    assert "not drained in time" not in (hosts.folder / "d0.log").read_text()
    return tokens


def test_hosts_that_are_started_by_hand_are_a_cluster(
    hosts: Hosts, plain: Callable[..., list[int]]
) -> None:
    nodes = {name: hosts.node(name) for name in NODES}  # they wait for the gateway
    cluster = hosts.gateway()
    wait_for(cluster, *EVERYONE)

    # The second turn hits: its blocks are read and delivered by the reader.
    answer = cluster.generate(FIRST)
    assert answer.output_ids == plain(FIRST)
    cluster.wait_stored()
    cluster.flush_engines()
    drain(cluster, True, "agent-p0", "agent-d0")
    second = FIRST + answer.output_ids + prompt(30, seed=2)

    def second_turn_hits() -> set[str]:
        answer = cluster.generate(second)
        assert answer.output_ids == plain(second)
        assert answer.cached_tokens >= FIRST_TOKENS // 64 * 64
        return answer.reader_agents

    assert second_turn_hits() == {"agent-r0"}
    drain(cluster, False, "agent-p0", "agent-d0")

    # A gateway that was killed is told again who is there.
    cluster.process.kill()
    cluster.process.wait(END_TIMEOUT_S)
    cluster = hosts.gateway()
    wait_for(cluster, *EVERYONE)
    wait_directory(cluster)
    cluster.flush_engines()
    second_turn_hits()

    # A reader leaves, and a decode node whose request goes on to its end.
    nodes["r0"].send_signal(signal.SIGTERM)
    ended(hosts, "r0", nodes["r0"])
    wait_for(cluster, *(name for name in EVERYONE if name != "agent-r0"))
    assert leave_while_serving(hosts, cluster, nodes["d0"]) == plain(FIRST, **LONG)
    wait_for(cluster, "agent-p0", "p0")

    # It comes back under its name; its blocks are still in the remote tier.
    nodes["d0"] = hosts.node("d0")
    wait_for(cluster, "agent-p0", "agent-d0", "p0", "d0")
    wait_directory(cluster)
    cluster.flush_engines()
    second_turn_hits()
    for name in ("p0", "d0"):
        nodes[name].send_signal(signal.SIGTERM)
    for name in ("p0", "d0"):
        ended(hosts, name, nodes[name])
