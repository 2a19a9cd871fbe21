"""Hosts as network namespaces, and a gateway and nodes of a cluster that a test starts on them by
hand."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from benchmarks.testbed.network import OPEN_MBIT, Network, Rates, own_shared_memory, within
from common.user_files import write_private
from tests.cluster import Cluster, get

PORT = 30000
BACK_TIMEOUT_S = 240
END_TIMEOUT_S = 120

needs_hosts = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"
)


class Hosts:
    """The hosts, and what is started on them."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network = network
        self.folder = folder
        self.secret = folder / "secret"
        write_private(self.secret, b"s" * 32)
        self.started: list[subprocess.Popen[bytes]] = []

    def gateway(self, *flags: str, port: int = PORT) -> Cluster:
        """In the control namespace, where the test is, too."""
        # Whether a hit is worth its load depends on how busy this machine is.
        listen = ("--host=0.0.0.0", f"--port={port}")
        flags = ("--path-policy=n-way", "--load-policy=always", *flags)
        name = "gateway" if port == PORT else f"gateway-{port}"
        process = self._start(name, [], "launch.gateway", *listen, *flags)
        return Cluster(process, f"http://127.0.0.1:{port}", self.folder)

    def node(self, host: str, role: str, *more: str) -> subprocess.Popen[bytes]:
        """Named after its host, unless ``more`` flags say otherwise."""
        flags = ["--join", f"http://10.77.2.254:{PORT}", "--role", role, "--name", host]
        flags += [f"--host={self.network.compute_address(host)}", "--model=tiny", "--device=cpu"]
        flags += ["--transfer=tcp", "--poison-kv", "--dram-bytes=64MiB", "--ssd-bytes=0"]
        flags += [f"--remote={(self.folder / 'remote').as_uri()}", "--max-total-tokens=20480"]
        flags += [f"--log-dir={self.folder / host}", *more]
        # Ranks that find each other's shared memory take themselves for neighbours.
        where = (*within(self.network.namespace(host)), *own_shared_memory())
        return self._start(host, where, "launch.node", *flags)

    def processes(self, host: str) -> list[int]:
        listed = subprocess.run(
            ["ip", "netns", "pids", self.network.namespace(host)], capture_output=True, text=True
        )
        return [int(pid) for pid in listed.stdout.split()]

    def log(self, host: str) -> str:
        """What the node, or the gateway, has said."""
        return (self.folder / f"{host}.log").read_text()

    def ended(self, host: str, node: subprocess.Popen[bytes]) -> None:
        """After a drain: in good order, with nothing left."""
        assert node.wait(END_TIMEOUT_S) == 0, self.log(host)
        assert self.processes(host) == []

    def _start(
        self, name: str, where: Sequence[str], module: str, *flags: str
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


@contextlib.contextmanager
def hosts_of(names: Sequence[str], folder: Path) -> Iterator[Hosts]:
    """Hosts of these names; nothing is left on them afterwards."""
    network = Network(names, Rates(storage_mbit=OPEN_MBIT, compute_mbit=OPEN_MBIT))
    network.build()
    hosts = Hosts(network, folder)
    try:
        with network.entered():
            yield hosts
    finally:
        hosts.end()
        network.remove()


def wait_for(cluster: Cluster, *names: str) -> None:
    """Until the gateway uses these agents and engines, and nobody else, and serves if it can."""

    def there() -> bool:
        state = cluster.state()
        living = {e["name"] for kind in ("agents", "engines") for e in state[kind] if e["alive"]}
        can_serve = {"p", "d"} <= {name[0] for name in names}
        return living == set(names) and (not can_serve or get(f"{cluster.url}/health")[0] == 200)

    cluster.wait_until(there, BACK_TIMEOUT_S, f"{names} are there")


def wait_directory(cluster: Cluster, blocks: int) -> None:
    """Until the gateway knows so many blocks, which agents tell it."""
    cluster.wait_until(
        lambda: cluster.state()["directory_blocks"] >= blocks, 60, "blocks are known"
    )
