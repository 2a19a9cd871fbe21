"""A gateway and nodes that a test starts, each a process of its own as on many hosts, with
stand-ins for SGLang."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest

from common.user_files import write_private
from tests.cluster import free_port_block, get
from tests.control import SECRET
from tests.launch.node.stand_in import WORD_DELAY_S, install

Process = subprocess.Popen[bytes]
ROLES = {"p": "prefill", "d": "decode", "r": "reader"}
"""By the first letter of a node's name."""
TIMEOUT_S = 60
CHAT = {"model": "stub", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
_NODE_PORTS, _OTHER_PORTS = 100, 10


class Processes:
    """What a test has started: nodes ``p0``, ``d0`` ... have ports of their own."""

    def __init__(self, folder: Path, nodes: Sequence[str]) -> None:
        self.folder = folder
        self.nodes = list(nodes)
        self.ports = free_port_block(_OTHER_PORTS + len(nodes) * _NODE_PORTS)
        self.url = f"http://127.0.0.1:{self.ports}"
        self.env = {**install(folder), WORD_DELAY_S: "0.5"}
        self.started: list[Process] = []
        self.timeout_s = 60.0
        write_private(folder / "secret", SECRET.encode())

    def gateway(self) -> Process:
        return self._start("gateway", "launch.gateway", f"--port={self.ports}")

    def node(self, name: str, env: Mapping[str, str] = MappingProxyType({})) -> Process:
        """``env``: what it has besides."""
        base_port = self.ports + _OTHER_PORTS + _NODE_PORTS * self.nodes.index(name)
        flags = [
            f"--join={self.url}",
            f"--role={ROLES[name[0]]}",
            f"--name={name}",
            "--model=org/stub",
        ]
        flags += [f"--base-port={base_port}", f"--log-dir={self.folder}", "--device=cpu"]
        flags += ["--dram-bytes=1MiB", "--ssd-bytes=0", "--transfer=tcp", "--host=127.0.0.1"]
        return self._start(name, "launch.node", *flags, env=env)

    def _start(
        self, name: str, module: str, *flags: str, env: Mapping[str, str] = MappingProxyType({})
    ) -> Process:
        argv = [sys.executable, "-m", module, f"--cluster-secret-file={self.folder / 'secret'}"]
        with (self.folder / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(
                [*argv, *flags], stdout=output, stderr=output, env={**self.env, **env}
            )
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
            await asyncio.wait_for(wait(), self.timeout_s)
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

    def end(self) -> None:
        for process in self.started:
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
