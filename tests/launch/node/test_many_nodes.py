"""Many hosts join one gateway, each with a time of day of its own; some leave and some die at once.

``DUALPATH_NODES=40 pytest -s`` has forty of them, and prints what it took."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from benchmarks import own_clock
from launch.cluster.child import session_members
from tests.cluster import get
from tests.launch.node.processes import Process, Processes, chat, children_of

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(1200)]

ASKED = "DUALPATH_NODES" in os.environ
NODES = int(os.environ.get("DUALPATH_NODES", "5"))
AT_ONCE = 5
"""Nodes that start together: on two cores all others wait meanwhile."""
LETTERS = "pdpdr"
"""Of every five nodes two are prefill nodes, two decode nodes, and one is a reader."""
CLOCKS_S = (0, 2 * 86_400, -2 * 86_400)
LOOK_S = 5.0


def names_of(nodes: int) -> list[str]:
    letters = [LETTERS[i % len(LETTERS)] for i in range(nodes)]
    return [f"{letter}{letters[:i].count(letter)}" for i, letter in enumerate(letters)]


NAMES = names_of(NODES)
LEAVING, DYING = NAMES[0::4], NAMES[1::4]
STAYING = [name for name in NAMES if name not in (*LEAVING, *DYING)]


class Crowd:
    """Nodes, and the gateway that they join."""

    def __init__(self, folder: Path) -> None:
        self.processes = Processes(folder, NAMES)
        self.processes.timeout_s += 5 * NODES
        self.gateway = self.processes.gateway()
        self.nodes: dict[str, Process] = {}
        self.sessions: list[int] = []
        """Of processes that nodes have started."""
        self._clocks = folder / "clocks"
        self._clocks.mkdir()
        own_clock.build(self._clocks)

    async def start(self, *names: str) -> float:
        """Returns when the last one was started."""
        for i, name in enumerate(names):
            if i % AT_ONCE == 0:
                await self._wait_agents(names[:i])
            file = self._clocks / name
            own_clock.write_offset(file, CLOCKS_S[NAMES.index(name) % len(CLOCKS_S)])
            self.nodes[name] = self.processes.node(name, own_clock.environment(self._clocks, file))
        return time.monotonic()

    async def _wait_agents(self, names: Sequence[str]) -> None:
        agents = {f"agent-{name}" for name in names}
        await self.processes.until(lambda: agents <= self.processes.living().keys(), "agents")

    async def wait_used(self, *names: str) -> None:
        """The gateway hears them, and every engine among them can be delivered to by all."""
        agents = {f"agent-{name}" for name in names}
        engines = {name for name in names if name[0] != "r"}
        await self.processes.wait_living(*agents, *engines)
        await self.processes.until(
            lambda: all(self._linked().get(engine, 0) >= len(agents) for engine in engines),
            "every engine is linked to every agent",
        )
        for name in names:
            self.sessions += children_of(self.nodes[name])

    def _linked(self) -> dict[str, int]:
        """How many agents each engine is linked to, by the gateway's metrics."""
        text = get(f"{self.processes.url}/metrics")[1]
        rows = re.findall(r'dualpath:engine_linked_agents\{engine="(\w+)"\} (\d+)', text)
        return {engine: int(agents) for engine, agents in rows}

    async def ended(self, *names: str) -> None:
        for name in names:
            await asyncio.to_thread(self.nodes[name].wait, self.processes.timeout_s)

    def told(self, what: str, began_s: float) -> None:
        print(f"{what}: {time.monotonic() - began_s:.1f} s, load {os.getloadavg()[0]:.0f}")

    async def tell_costs(self) -> None:
        gateway = psutil.Process(self.gateway.pid)
        before = gateway.cpu_times()
        await asyncio.sleep(LOOK_S)
        spent_s = sum(gateway.cpu_times()[:2]) - sum(before[:2])
        rss = {"gateway": gateway.memory_info().rss}
        for pid in self.sessions:
            process = psutil.Process(pid)
            rss[process.cmdline()[-1]] = process.memory_info().rss
        rss["launch.node"] = psutil.Process(self.nodes[NAMES[0]].pid).memory_info().rss
        print(f"gateway: {spent_s / LOOK_S:.1%} of a core, {gateway.num_fds()} descriptors")
        print({name: f"{n / 1e6:.0f} MB" for name, n in rss.items()})


@pytest.fixture
def crowd(tmp_path: Path) -> Iterator[Crowd]:
    crowd = Crowd(tmp_path)
    yield crowd
    crowd.processes.end()


async def answers(crowd: Crowd, stop: asyncio.Event) -> int:
    """Of requests that are sent one after the other meanwhile; all succeed."""
    answered = 0
    while not stop.is_set():
        assert "three" in await asyncio.to_thread(chat, crowd.processes.url)
        answered += 1
    return answered


async def test_hosts_join_and_leave_and_die_and_come_back(crowd):
    last_start_s = await crowd.start(*NAMES)
    await crowd.wait_used(*NAMES)
    crowd.told(f"{NODES} hosts have joined since the last one's start", last_start_s)
    await crowd.processes.wait_healthy()
    if ASKED:
        await crowd.tell_costs()

    # Some leave under load: nobody notices.
    stop = asyncio.Event()
    load = asyncio.create_task(answers(crowd, stop))
    began_s = time.monotonic()
    for name in LEAVING:
        crowd.nodes[name].send_signal(signal.SIGTERM)
    await crowd.ended(*LEAVING)
    crowd.told(f"{len(LEAVING)} have left", began_s)
    assert {crowd.nodes[name].returncode for name in LEAVING} == {0}
    await crowd.wait_used(*STAYING, *DYING)
    stop.set()
    assert await load > 0

    # Others die, with all that they have started: what remains goes on. Then all are there again,
    # under the names that they had, with greater numbers, whatever a clock says.
    before = await asyncio.to_thread(crowd.processes.living)
    orphans = [child for name in DYING for child in children_of(crowd.nodes[name])]
    for name in DYING:
        crowd.nodes[name].kill()
    await crowd.ended(*DYING)
    await crowd.processes.until(lambda: session_members(orphans) == [], "children have ended")
    await crowd.wait_used(*STAYING)
    assert "three" in await asyncio.to_thread(chat, crowd.processes.url)
    last_start_s = await crowd.start(*LEAVING, *DYING)
    await crowd.wait_used(*NAMES)
    crowd.told("they are back since the last one's start", last_start_s)
    now = await asyncio.to_thread(crowd.processes.living)
    came_back = {name for name in before if name.removeprefix("agent-") in DYING}
    assert came_back == {name for name in before if now[name] > before[name]}
    assert "three" in await asyncio.to_thread(chat, crowd.processes.url)

    for node in crowd.nodes.values():
        node.send_signal(signal.SIGTERM)
    await crowd.ended(*NAMES)
    assert session_members(crowd.sessions) == []
