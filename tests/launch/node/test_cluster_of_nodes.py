"""A gateway and nodes, each a process of its own as on many hosts, with stand-ins for SGLang: they
join in any order, drain with a request under way, outlive the gateway, and come back as they were
called."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.user_files import write_private
from launch.cluster.child import session_members
from tests.cluster import free_port_block, get
from tests.control import SECRET
from tests.launch.node.stand_in import WORD_DELAY_S, install

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(300)]

ROLES = {"p0": "prefill", "d0": "decode", "r0": "reader"}
TIMEOUT_S = 60
CHAT = {"model": "stub", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


class Processes:
    """What a test has started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = free_port_block(400)
        self.url = f"http://127.0.0.1:{self.ports}"
        self.env = {**install(folder), WORD_DELAY_S: "0.5"}
        self.started: list[subprocess.Popen[bytes]] = []
        write_private(folder / "secret", SECRET.encode())

    def gateway(self) -> subprocess.Popen[bytes]:
        return self._start("gateway", "launch.gateway", f"--port={self.ports}")

    def node(self, name: str) -> subprocess.Popen[bytes]:
        base_port = self.ports + 10 + 100 * list(ROLES).index(name)
        flags = [
            f"--join={self.url}",
            f"--role={ROLES[name]}",
            f"--name={name}",
            "--model=org/stub",
        ]
        flags += [f"--base-port={base_port}", f"--log-dir={self.folder}", "--device=cpu"]
        flags += ["--dram-bytes=1MiB", "--ssd-bytes=0", "--transfer=tcp", "--host=127.0.0.1"]
        return self._start(name, "launch.node", *flags)

    def _start(self, name: str, module: str, *flags: str) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", module, f"--cluster-secret-file={self.folder / 'secret'}"]
        with (self.folder / f"{name}.out").open("ab") as output:
            process = subprocess.Popen([*argv, *flags], stdout=output, stderr=output, env=self.env)
        self.started.append(process)
        return process

    async def until(self, holds: Callable[[], bool], what: str) -> None:
        async def wait() -> None:
            while True:
                try:
                    if await asyncio.to_thread(holds):
                        return
                except OSError:  # the gateway does not listen yet
                    pass
                await asyncio.sleep(0.1)

        try:
            await asyncio.wait_for(wait(), TIMEOUT_S)
        except TimeoutError:
            logs = [
                f"== {f.name}\n{f.read_text()[-1500:]}" for f in self.folder.glob("*.[lo][ou]*")
            ]
            pytest.fail(f"not in time: {what}\n" + "\n".join(logs))

    def living(self) -> dict[str, int]:
        """Incarnations of those that the gateway hears."""
        state = json.loads(get(f"{self.url}/admin/cluster")[1])
        peers = [*state["agents"], *state["engines"]]
        return {peer["name"]: peer["incarnation"] for peer in peers if peer["alive"]}

    async def wait_living(self, *names: str) -> None:
        await self.until(lambda: self.living().keys() == set(names), f"{names} are there")

    async def wait_healthy(self) -> None:
        await self.until(lambda: get(f"{self.url}/health")[0] == 200, "health")


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tmp_path)
    yield processes
    for process in processes.started:
        if process.poll() is None:
            process.kill()
        process.wait(TIMEOUT_S)


def chat(url: str, **more: object) -> str:
    data = json.dumps({**CHAT, **more}).encode()
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", data, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return answer.read().decode()


def children_of(process: subprocess.Popen[bytes]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(child) for child in children.split()]


async def test_nodes_join_in_any_order_and_a_gateway_that_was_killed_finds_them_again(processes):
    for name in ROLES:
        processes.node(name)
    gateway = processes.gateway()
    everyone = ("agent-p0", "agent-d0", "agent-r0", "p0", "d0")
    await processes.wait_living(*everyone)
    await processes.wait_healthy()
    assert "three" in await asyncio.to_thread(chat, processes.url)
    gateway.kill()
    gateway.wait(TIMEOUT_S)
    processes.gateway()
    await processes.wait_living(*everyone)
    await processes.wait_healthy()
    assert "three" in await asyncio.to_thread(chat, processes.url)


async def test_a_node_drains_with_a_request_under_way_and_leaves_nothing(processes):
    processes.gateway()
    nodes = {name: processes.node(name) for name in ("p0", "d0")}
    await processes.wait_healthy()
    sessions = children_of(nodes["d0"])
    answer = asyncio.create_task(asyncio.to_thread(chat, processes.url, stream=True))
    await processes.until(
        lambda: json.loads(get(f"{processes.url}/admin/cluster")[1])["open_plans"] == 1, "a plan"
    )
    nodes["d0"].send_signal(signal.SIGTERM)
    text = await asyncio.wait_for(answer, TIMEOUT_S)
    assert "three" in text and "error" not in text
    assert await asyncio.to_thread(nodes["d0"].wait, TIMEOUT_S) == 0
    assert session_members(sessions) == []
    assert "not drained in time" not in (processes.folder / "d0.out").read_text()
    await processes.wait_living("agent-p0", "p0")


async def test_a_node_that_was_killed_comes_back_under_its_name(processes):
    processes.gateway()
    nodes = {name: processes.node(name) for name in ("p0", "d0")}
    await processes.wait_healthy()
    sessions = children_of(nodes["p0"])
    before = await asyncio.to_thread(processes.living)
    nodes["p0"].kill()
    nodes["p0"].wait(TIMEOUT_S)
    await processes.until(lambda: session_members(sessions) == [], "its children have ended")
    processes.node("p0")
    for name in ("agent-p0", "p0"):  # greater, whatever a clock says
        await processes.until(lambda n=name: processes.living().get(n, 0) > before[n], name)
    await processes.wait_healthy()
    assert "three" in await asyncio.to_thread(chat, processes.url)
