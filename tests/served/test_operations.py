"""What operators do to a cluster that serves: no request fails, and every token is right.

A load of conversations that never pauses; meanwhile the path policy is switched, a node is
drained and taken back, an agent gets a tenth of its time, and one tenant asks for far more than
its share.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.cluster import Answer, Cluster, get, post
from tests.served.conftest import OPTION, WITH_THE_CLUSTER
from tests.test_walk import POLICIES, prompt

pytestmark = WITH_THE_CLUSTER

PROMPTS = 6
CLIENTS = 3
HEAVY = 12
"""Requests that one tenant sends at once."""


@pytest.fixture(scope="module")
def expected(cluster) -> list[list[int]]:
    """Tokens of each prompt's cold answer, which the walk's tests prove to be plain SGLang's."""
    tokens = [cluster.generate(prompt(1500, seed=2000 + i)).output_ids for i in range(PROMPTS)]
    cluster.wait_stored()
    return tokens


@dataclass
class Load:
    """Clients that repeat the prompts in turns, each on one of its own."""

    cluster: Cluster
    expected: list[list[int]]
    answers: list[Answer] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Raises at the end what any client raised."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(self._repeat, client) for client in range(CLIENTS)]
            try:
                yield
            finally:
                self._ended.set()
            for client in clients:
                client.result(60)

    def _repeat(self, client: int) -> None:
        for turn in itertools.count(client):
            if self._ended.is_set():
                return
            which = turn % PROMPTS
            answer = self.cluster.generate(prompt(1500, seed=2000 + which), timeout_s=60)
            assert answer.output_ids == self.expected[which], answer.trace
            self.answers.append(answer)

    def take(self, count: int) -> list[Answer]:
        """Wait for ``count`` more answers; these."""
        before = len(self.answers)
        self.cluster.wait_until(lambda: len(self.answers) >= before + count, 90, "answers")
        return self.answers[before:]


@pytest.fixture
def load(cluster, expected) -> Iterator[Load]:
    load = Load(cluster, expected)
    with load.running():
        yield load


def admin_state(cluster: Cluster) -> dict:
    return json.loads(get(f"{cluster.url}/admin/cluster")[1])


def test_the_policy_is_switched_while_requests_run(cluster, load):
    for policy in (*POLICIES, *reversed(POLICIES)):
        cluster.set_policy(policy)
        load.take(2 * CLIENTS)
        assert admin_state(cluster)["policy"] == policy


def processes(cluster: Cluster) -> list[psutil.Process]:
    """All but the launcher, whose environment is where the test wrote the secret."""
    return psutil.Process(cluster.process.pid).children(recursive=True)


def test_no_secret_is_shown_and_no_file_is_for_others(cluster):
    engine_key, option, paths = "", "", set()
    for process in processes(cluster):
        environ = process.environ()
        if "DUALPATH_SECRETS" in environ:
            paths.add(Path(environ["DUALPATH_SECRETS"]))
    for path in paths:
        held = json.loads(path.read_bytes())
        engine_key = held.get("http_key") or engine_key
        option = held.get("remote_options", {}).get("secret", option)
    assert len(paths) == 7 and engine_key and option == OPTION
    logs = [path for path in cluster.log_dir.iterdir() if ".log" in path.name]
    shown = [path.read_text(errors="replace") for path in logs]
    shown.append((cluster.log_dir.parent / "cluster.out").read_text())
    for process in processes(cluster):
        shown.append(" ".join(process.cmdline()) + repr(process.environ()))
    shown.append(" ".join(psutil.Process(cluster.process.pid).cmdline()))
    assert not [text for text in shown if engine_key in text or OPTION in text]
    stores = [path for path in (cluster.log_dir.parent / "ssd").rglob("*") if "agent" in str(path)]
    private = [*paths, *(path.parent for path in paths), *logs, *stores]
    assert len(stores) > 3 and not [p for p in private if p.stat().st_mode & 0o077]


def test_an_engine_takes_calls_with_the_gateways_key_alone(cluster):
    port = next(
        argv[argv.index("--port") + 1]
        for argv in (process.cmdline() for process in processes(cluster))
        if "engine.serve" in argv
    )
    for route in ("model_info", "server_info", "flush_cache", "v1/models"):
        assert get(f"http://127.0.0.1:{port}/{route}")[0] == 401
    status, text = get(f"{cluster.url}/admin/engine/p0/server_info")
    assert status == 200 and json.loads(text)["api_key"] == "..."


def test_a_drained_node_gets_nothing_new_and_comes_back(cluster, load):
    cluster.set_policy("n-way")
    for name in ("d1", "agent-d1"):
        post(f"{cluster.url}/admin/drain", {"name": name, "on": True})
    load.take(2 * CLIENTS)  # those that were under way
    drained = load.take(3 * CLIENTS)
    assert {answer.trace["decode"] for answer in drained} == {"d0"}
    assert "agent-d1" not in set().union(*(answer.reader_agents for answer in drained))
    cluster.wait_until(lambda: _idle(cluster, "d1"), 20, "the drained engine is idle")
    for name in ("d1", "agent-d1"):
        post(f"{cluster.url}/admin/drain", {"name": name, "on": False})
    cluster.wait_until(
        lambda: "d1" in {answer.trace["decode"] for answer in load.answers[-2 * CLIENTS :]},
        60,
        "the engine is used again",
    )


def _idle(cluster: Cluster, name: str) -> bool:
    state = admin_state(cluster)
    return all(e["idle"] and e["draining"] for e in state["engines"] if e["name"] == name)


def test_an_agent_that_gets_a_tenth_of_its_time_fails_no_request(cluster, load):
    cluster.set_policy("n-way")
    load.take(CLIENTS)
    deadline = time.monotonic() + 8
    try:
        while time.monotonic() < deadline:
            cluster.signal("agent-d1", signal.SIGSTOP)
            time.sleep(0.45)
            cluster.signal("agent-d1", signal.SIGCONT)
            time.sleep(0.05)
    finally:
        cluster.signal("agent-d1", signal.SIGCONT)
    load.take(2 * CLIENTS)


def test_every_listener_is_listed_and_hears_only_whom_it_may(cluster):
    argv = [sys.executable, "-m", "transfer.check", "--ports", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    pids = {child.pid for child in psutil.Process(cluster.process.pid).children(recursive=True)}
    listed = [one for one in json.loads(done.stdout) if one["pid"] in pids]
    assert not [one for one in listed if one["is_open"]]
    assert {one["owner"] for one in listed} >= {"gateway", "agent-p0", "agent-d1", "p0", "d1"}
    at_ports = {one["where"].rpartition(":")[2]: one for one in listed if ":" in one["where"]}
    assert at_ports.keys() == _ports_by_ss(pids)
    others = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]
    everywhere = [port for port, one in at_ports.items() if one["where"].startswith(("0.", "[::]"))]
    assert len(everywhere) >= 6 * 2 + 3  # two of each Mooncake, and each rendezvous
    for port in everywhere:
        socket.create_connection(("127.0.0.1", int(port)), 5).close()
        for address in others[:1]:
            with pytest.raises(TimeoutError):
                socket.create_connection((address, int(port)), 0.3)


def _ports_by_ss(pids: set[int]) -> set[str]:
    lines = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in lines.splitlines()]
    return {
        row[3].rpartition(":")[2]
        for row in rows
        if {int(pid) for pid in re.findall(r"pid=(\d+)", row[-1])} & pids
    }


def test_a_tenant_that_floods_the_queue_does_not_keep_others_waiting(cluster, expected):
    ended: list[str] = []

    def ask(tenant: str, seed: int) -> None:
        cluster.generate(prompt(1500, seed=seed), timeout_s=60, user=tenant)
        ended.append(tenant)

    with ThreadPoolExecutor(HEAVY + 1) as pool:
        asked = [pool.submit(ask, "heavy", 3000 + i) for i in range(HEAVY)]
        cluster.wait_until(lambda: _queued(cluster) >= HEAVY // 2, 20, "the queue is long")
        before = len(ended)
        asked.append(pool.submit(ask, "light", 4000))
        for one in asked:
            one.result(90)
    # Before it: what had a plan (two or three), and the one whose turn it was.
    assert ended.index("light") - before <= HEAVY // 3, ended


def _queued(cluster: Cluster) -> int:
    return admin_state(cluster)["requests"]["queued"]
