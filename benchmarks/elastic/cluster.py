"""A gateway and nodes on their hosts, each started as its user would."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.clients.operator import Operator
from benchmarks.elastic.hosts import GATEWAYS, Hosts
from benchmarks.elastic.steps import NODES
from benchmarks.own_cluster import ClusterFailed, tail

PORTS = dict(zip(GATEWAYS, (30000, 30001), strict=True))
URLS = [f"http://127.0.0.1:{port}" for port in PORTS.values()]
POOL_TOKENS = 8192
DRAM_MIB, SSD_MIB = 24, 32
"""48 and 64 blocks. Of all five nodes together too little for what is asked again and again, as
the pools are, so that it is read from the remote tier and delivered all the time."""
START_TIMEOUT_S = 240.0
END_TIMEOUT_S = 150.0
LOOK_S = 0.02
SERVES = b"serves; SIGTERM drains"
"""What ``launch.node`` says once its processes serve."""


@dataclass(frozen=True)
class Running:
    """A process that was started."""

    process: subprocess.Popen[bytes]
    log: Path
    before: int
    """Bytes of the log that an earlier one has written."""
    begun_s: float

    @property
    def has_served(self) -> bool:
        return SERVES in self.log.read_bytes()[self.before :]


class Cluster:
    """Its processes by name: a gateway's, or a node's."""

    def __init__(self, hosts: Hosts, model: Path, scratch: Path, logs: Path) -> None:
        self.hosts = hosts
        self.operators = dict(zip(GATEWAYS, map(Operator, URLS), strict=True))
        self.running: dict[str, Running] = {}
        gateway = hosts[GATEWAYS[0]].address
        self._gateways = ",".join(f"http://{gateway}:{port}" for port in PORTS.values())
        self._model = model
        self._remote = scratch / "remote"
        self._remote.mkdir()
        self._logs = logs

    async def close(self) -> None:
        for operator in self.operators.values():
            await operator.close()
        for name in list(self.running):
            self.signal(name, signal.SIGKILL)

    # ---- starting -----------------------------------------------------------------------

    @property
    def nodes(self) -> list[str]:
        """That run."""
        return [name for name in self.running if name not in GATEWAYS]

    def start_gateway(self, name: str) -> None:
        """The first one is active, the other its standby."""
        flags = ["--host=0.0.0.0", f"--port={PORTS[name]}", "--standby-of", self._gateways]
        flags += ["--path-policy=n-way", "--load-policy=always"]
        self._start(name, "launch.gateway", flags, 0)

    def start_node(self, name: str, clock_s: int = 0) -> None:
        flags = ["--join", self._gateways, "--role", NODES[name], "--name", name]
        flags += ["--host", self.hosts[name].address]
        flags += ["--model", str(self._model), "--device=cpu", "--transfer=tcp", "--poison-kv"]
        flags += [f"--dram-bytes={DRAM_MIB}MiB", f"--ssd-bytes={SSD_MIB}MiB"]
        flags += [f"--remote={self._remote.as_uri()}", f"--max-total-tokens={POOL_TOKENS}"]
        self._start(name, "launch.node", flags, clock_s)

    def _start(self, name: str, module: str, flags: list[str], clock_s: int) -> None:
        log = self._logs / f"{name}.log"
        before = log.stat().st_size if log.exists() else 0
        begun_s = time.monotonic()
        process = self.hosts[name].start(module, flags, log, clock_s)
        self.running[name] = Running(process, log, before, begun_s)

    async def serves(self, name: str) -> float:
        """When this node had started, by its own word; raises :class:`ClusterFailed`."""
        running = self._running(name)
        while not running.has_served:
            if running.process.poll() is not None:
                raise ClusterFailed(f"{name} ended:\n{tail(running.log)}")
            if time.monotonic() > running.begun_s + START_TIMEOUT_S:
                raise ClusterFailed(f"{name} does not serve:\n{tail(running.log)}")
            await asyncio.sleep(LOOK_S)
        return time.monotonic()

    # ---- ending -------------------------------------------------------------------------

    def signal(self, name: str, number: signal.Signals) -> None:
        self._running(name).process.send_signal(number)

    async def ended(self, name: str) -> tuple[int, float]:
        """Its exit status, and when; raises :class:`ClusterFailed`, and kills it then."""
        running, give_up_at = self._running(name), time.monotonic() + END_TIMEOUT_S
        while (status := running.process.poll()) is None:
            if time.monotonic() > give_up_at:
                running.process.kill()
                raise ClusterFailed(f"{name} does not end:\n{tail(running.log)}")
            await asyncio.sleep(LOOK_S)
        del self.running[name]
        return status, time.monotonic()

    def _running(self, name: str) -> Running:
        if name not in self.running:
            raise ClusterFailed(f"{name} does not run")
        return self.running[name]
