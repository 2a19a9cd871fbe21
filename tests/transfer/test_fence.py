"""Bytes of a failed write that a kernel still has never land in a page that has been given back.

Real agents and Mooncake on two hosts, which are namespaces with a slow link between them. A lost
connection is shown under the rule that was ours before as well, which went by time: there the late
bytes land in the page's next block, so the test would see them if they came.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks.testbed.network import entered
from common.block import BlockLayout
from common.messages.from_agents import JobEnded
from common.messages.from_gateway import Subscribe
from tests.transfer.agent.agent_process import AgentProcess, FakeGateway, running_agent
from tests.transfer.agent.fake_engine import EngineWithJobs, FakeEngine, content_of
from tests.transfer.agent.test_agent import deliver, store
from transfer.connections import data_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
]
HOSTS = {"a": "10.96.0.1", "b": "10.96.0.2"}
LAYOUT = BlockLayout(4, 4, (1 << 18, 1 << 17))
BLOCKS = range(8)
PAGES = range(20, 28)
OTHERS = 500
"""First of the blocks that get the pages next."""
OLD_GRACE_S = 1.0
ENOUGH = 100_000
"""Bytes on their way when the fault comes."""
PLAN, JOB_DEADLINE_S = 7, 30.0


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout


def namespace(host: str) -> str:
    return f"dpfence{os.getpid()}-{host}"


@pytest.fixture
def hosts() -> Iterator[None]:
    try:
        for host in HOSTS:
            run("ip", "netns", "add", namespace(host))
            run("ip", "-n", namespace(host), "link", "set", "dev", "lo", "up")
        ends = [("name", "link", "netns", namespace(host)) for host in HOSTS]
        run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host, address in HOSTS.items():
            run("ip", "-n", namespace(host), "address", "add", f"{address}/24", "dev", "link")
            run("ip", "-n", namespace(host), "link", "set", "dev", "link", "up")
        bucket = ("tbf", "rate", "32mbit", "burst", "64kb", "latency", "300ms")
        run("tc", "-n", namespace("a"), "qdisc", "add", "dev", "link", "root", *bucket)
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", namespace(host)], check=False)


@dataclass
class World:
    agent: AgentProcess
    engine: FakeEngine
    port: int
    """Where the engine's Mooncake listens."""
    incarnation: int
    job: int = 1

    def written(self) -> int:
        """Layers of the job that the agent says are there."""
        return self.engine.board(0)[1]

    def assert_held(self) -> None:
        """A fence has not passed."""
        if isinstance(self.engine, EngineWithJobs):
            assert self.engine.held_pages() == list(PAGES)

    def partition(self) -> None:
        """Nothing passes between the agent's host and the engine's data port; messages do."""
        ways = f"tcp dport {self.port} drop; tcp sport {self.port} drop;"
        chains = "".join(
            f"chain {hook} {{ type filter hook {hook} priority 0; {ways} }};"
            for hook in ("input", "output")
        )
        self._nft(f"table inet cut {{ {chains} }}")

    def heal(self) -> None:
        self._nft("delete table inet cut")

    def _nft(self, command: str) -> None:
        run("ip", "netns", "exec", namespace("a"), "nft", command)

    def late_bytes(self) -> int:
        """What the agent's kernel still has for the engine, of connections that are closed."""
        return self.unsent_bytes("fin-wait-1") + self.unsent_bytes("closing")

    def unsent_bytes(self, state: str) -> int:
        """What it has for the engine, of connections in this state."""
        wanted = ("state", state, "dport", "=", f":{self.port}")
        listed = run("ip", "netns", "exec", namespace("a"), "ss", "-Htn", *wanted)
        return sum(int(line.split()[1]) for line in listed.splitlines())


@contextmanager
def writing(tmp_path, has_fence: bool) -> Iterator[World]:
    """A delivery from one host to the other is in the middle of a layer."""
    control = f"tcp://{HOSTS['a']}:30100"
    dram_bytes = 2 * len(BLOCKS) * LAYOUT.block_bytes
    here: dict[str, Any] = {"host": HOSTS["a"], "control": control, "dram_bytes": dram_bytes}
    started: list[FakeEngine] = []
    with entered(namespace("a")), running_agent(tmp_path, **here) as agent:
        gateway = FakeGateway(control)
        try:
            gateway.send(Subscribe())
            own = FakeEngine("d0", {"a0": control}, layout=LAYOUT, host=HOSTS["a"])
            started.append(own)
            with entered(namespace("b")):
                kind = EngineWithJobs if has_fence else FakeEngine
                engine = kind("p0", {"a0": control}, layout=LAYOUT, host=HOSTS["b"])
                started.append(engine)
            own.wait_alive("a0")
            incarnation = engine.wait_alive("a0")
            world = World(agent, engine, data_port(engine.session_id), incarnation)
            store(own, 1, BLOCKS)
            gateway.read(PLAN, BLOCKS)
            if isinstance(engine, EngineWithJobs):
                world.job = engine.open_job("a0", PAGES)
            deliver(engine, world.job, PLAN, BLOCKS, PAGES, deadline_s=JOB_DEADLINE_S)
            wait_until(lambda: world.written() >= 1 and world.unsent_bytes("established") > ENOUGH)
            yield world
        finally:
            gateway.close()
            for each in started:
                each.kill()


def wait_until(holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- faults, each up to what told the engine before that nothing can land any more ----------


def lost(world: World) -> None:
    """Nothing else: the write fails."""
    end = world.engine.wait_end(world.job)
    assert isinstance(end, JobEnded) and end.may_land
    time.sleep(OLD_GRACE_S)
    world.assert_held()


def killed(world: World) -> None:
    """And the agent too; another one is there soon."""
    world.agent.kill()
    world.agent.start()
    world.engine.wait_alive("a0", world.incarnation, timeout_s=30)
    time.sleep(OLD_GRACE_S)


def suspended(world: World) -> None:
    """The agent too, for longer than all timeouts; it gives the write up when it goes on."""
    world.agent.process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    world.assert_held()
    world.agent.process.send_signal(signal.SIGCONT)
    world.engine.wait_end(world.job, timeout_s=30)
    time.sleep(OLD_GRACE_S)


@pytest.mark.parametrize(
    ("fault", "has_fence"),
    [(lost, False), (lost, True), (killed, True), (suspended, True)],
)
def test_late_bytes_do_not_land_in_pages_that_were_given_back(hosts, tmp_path, fault, has_fence):
    with writing(tmp_path, has_fence) as world:
        world.partition()
        fault(world)
        assert world.late_bytes()
        if isinstance(world.engine, EngineWithJobs):
            world.heal()
            world.engine.wait_over()
            world.engine.fill_all(PAGES, OTHERS)
        else:
            world.engine.fill_all(PAGES, OTHERS)
            world.heal()
        wait_until(lambda: not world.late_bytes(), timeout_s=60)
        time.sleep(0.2)  # what has arrived is read
        blocks = range(OTHERS, OTHERS + len(PAGES))
        intact = [
            world.engine.page_bytes(page) == content_of(block, LAYOUT)
            for page, block in zip(PAGES, blocks, strict=True)
        ]
        assert all(intact) == has_fence
