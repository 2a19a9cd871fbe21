"""The two hosts, the link between them with and without classes, and the processes on them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.testbed.network import Network, Rates, within
from transfer.traffic import cgroup
from transfer.traffic.classes import TrafficClass, TrafficSettings
from transfer.traffic.ethernet import make_rules
from transfer.traffic.host import Host

LINK_MBIT = 400.0
DEVICE = "compute"
SETTINGS = TrafficSettings(cgroup="dualpath-bench-low")
SENDER, RECEIVER = "a", "b"
ANSWER_S = 60.0
_TIMEOUTS = {
    "MC_TRANSFER_TIMEOUT": "15",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "5",
    "MC_TCP_STATUS_TIMEOUT_SEC": "5",
}
"""As the launcher sets them: in a flood, batches of the low class make little progress."""


class WorkerFailed(Exception):
    """A process of the benchmark has ended or does not answer."""


class Link:
    """Two hosts with two links of one rate: ``compute``, whose queues tell the classes apart or
    do not, and ``storage``, for the control arm."""

    def __init__(self, nodes: Sequence[str] = (SENDER, RECEIVER)) -> None:
        self.network = Network(nodes, Rates(LINK_MBIT, LINK_MBIT))
        self._has_classes = False

    def build(self) -> None:
        self.network.build()

    def remove(self) -> None:
        self.network.remove()
        if (folder := cgroup.find(SETTINGS.cgroup)) is not None:
            cgroup.remove(folder)

    def set_classes(self, on: bool) -> None:
        """Of what either host sends over the compute link."""
        if on == self._has_classes:
            return
        self._has_classes = on
        rules = make_rules(DEVICE, LINK_MBIT, SETTINGS)
        for node in self.network.nodes:
            host = self._host(node)
            if on:
                host.apply(rules, replace=True)
            else:
                host.remove(DEVICE)
                self.network.limit_compute(node)

    def sent_bytes(self) -> dict[str, int]:
        """What all hosts have sent over their compute links in each class, headers and all."""
        counts = [self._host(node).sent_bytes(DEVICE) for node in self.network.nodes]
        return {of.value: sum(count[of] for count in counts) for of in TrafficClass}

    def _host(self, node: str) -> Host:
        return Host(("nsenter", f"--net=/run/netns/{self.network.namespace(node)}"))

    def address(self, node: str, on_storage: bool = False) -> str:
        if on_storage:
            return self.network.storage_address(node)
        return self.network.compute_address(node)

    def start(
        self, role: str, node: str, core: int, on_storage: bool = False, low: bool = False
    ) -> Worker:
        """A worker on a host; ``low``: in the control group of the low class."""
        argv = [
            *within(self.network.namespace(node)),
            *(sys.executable, "-m", "benchmarks.traffic.worker"),
            *(role, self.address(node, on_storage), str(core)),
        ]
        with cgroup.entry(SETTINGS.cgroup if low else "") as group:
            return Worker(role, argv, group)


class Worker:
    """A started process. ``ready`` is what it said first."""

    def __init__(self, role: str, argv: list[str], group: int | None) -> None:
        self._role = role

        def prepare() -> None:
            if group is not None:
                cgroup.join(group)

        self._process = subprocess.Popen(
            argv,
            env={**os.environ, **_TIMEOUTS},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            preexec_fn=prepare,
            cwd=Path(__file__).resolve().parents[2],
        )
        self.ready = self.answer()

    def send(self, call: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        print(json.dumps({"call": call, **arguments}), file=self._process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        # One answer at a time is under way, so nothing is left in the buffer.
        if not select.select([stdout], [], [], ANSWER_S)[0]:
            raise WorkerFailed(f"{self._role} does not answer within {ANSWER_S:g} s")
        line = stdout.readline()
        if not line:
            raise WorkerFailed(f"{self._role} ended with code {self._process.wait()}")
        return json.loads(line)

    def ask(self, call: str, **arguments: Any) -> dict[str, Any]:
        self.send(call, **arguments)
        return self.answer()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def built_link(nodes: Sequence[str] = (SENDER, RECEIVER)) -> Iterator[Link]:
    link = Link(nodes)
    try:
        link.build()
        yield link
    finally:
        link.remove()
