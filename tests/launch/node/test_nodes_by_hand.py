"""A cluster on several hosts, each started by hand: two gateways, a prefill node, a decode node and
a reader in network namespaces of their own. They join, serve the tokens of plain SGLang, outlive
the gateway, drain, and leave nothing behind. (Those that come back: test_engines_over_hosts.py.)"""

from __future__ import annotations

import concurrent.futures
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import GREEDY, Answer, Cluster, plain_tokens, post, prompt
from tests.launch.gateway.standby.two_gateways import (
    JOIN,
    STANDBY_OF,
    STANDBY_PORT,
    take_over,
)
from tests.launch.node.hosts import (
    END_TIMEOUT_S,
    Hosts,
    hosts_of,
    needs_hosts,
    wait_for,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    needs_hosts,
]

NODES = {"p0": "prefill", "d0": "decode", "r0": "reader"}
EVERYONE = ("agent-p0", "agent-d0", "agent-r0", "p0", "d0")
FIRST_TOKENS = 700
FIRST = prompt(FIRST_TOKENS, seed=1)
LONG = {**GREEDY, "max_new_tokens": 300}


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture
def hosts(folder: Path) -> Iterator[Hosts]:
    with hosts_of(list(NODES), folder) as hosts:
        yield hosts


@pytest.fixture
def plain(hosts: Hosts) -> Iterator[Callable[..., list[int]]]:
    with plain_tokens(hosts.folder) as generate:
        yield generate


def drain(cluster: Cluster, on: bool, *names: str) -> None:
    for name in names:
        post(f"{cluster.url}/admin/drain", {"name": name, "on": on})


def leave_while_serving(hosts: Hosts, cluster: Cluster, node: subprocess.Popen[bytes]) -> list[int]:
    """SIGTERM at the decode node while a request is under way; returns the request's tokens."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        request = pool.submit(cluster.generate, FIRST, sampling_params=LONG)
        cluster.wait_until(lambda: cluster.state()["open_plans"] == 1, 30, "it is planned")
        node.send_signal(signal.SIGTERM)
        tokens = request.result(END_TIMEOUT_S).output_ids
    hosts.ended("d0", node)
    assert "not drained in time" not in hosts.log("d0")
    return tokens


def test_hosts_that_are_started_by_hand_are_a_cluster(
    hosts: Hosts, plain: Callable[..., list[int]]
) -> None:
    # They wait for the gateway.
    nodes = {name: hosts.node(name, role, JOIN) for name, role in NODES.items()}
    cluster = hosts.gateway(STANDBY_OF)
    wait_for(cluster, *EVERYONE)
    standby = hosts.gateway(STANDBY_OF, port=STANDBY_PORT)

    # The second turn hits: its blocks are read and delivered by the reader.
    answer = cluster.generate(FIRST)
    assert answer.output_ids == plain(FIRST)
    cluster.wait_stored()
    cluster.flush_engines()
    drain(cluster, True, "agent-p0", "agent-d0")
    second = FIRST + answer.output_ids + prompt(30, seed=2)

    def hits(answer: Answer) -> set[str]:
        assert answer.output_ids == plain(second)
        assert answer.cached_tokens >= FIRST_TOKENS // 64 * 64
        return answer.reader_agents

    assert hits(cluster.generate(second)) == {"agent-r0"}

    # One gateway after the other is lost: the drains and the blocks are known all the time.
    for answer in take_over(hosts, cluster, standby, second):
        hits(answer)
    assert cluster.metrics()["dualpath:gateway_takeovers_total"] == 1
    drained = {agent["name"] for agent in cluster.state()["agents"] if agent["draining"]}
    assert drained == {"agent-p0", "agent-d0"}
    drain(cluster, False, "agent-p0", "agent-d0")

    # A reader leaves, and a decode node whose request goes on to its end.
    nodes["r0"].send_signal(signal.SIGTERM)
    hosts.ended("r0", nodes["r0"])
    wait_for(cluster, *(name for name in EVERYONE if name != "agent-r0"))
    assert leave_while_serving(hosts, cluster, nodes["d0"]) == plain(FIRST, **LONG)
    wait_for(cluster, "agent-p0", "p0")
    nodes["p0"].send_signal(signal.SIGTERM)
    hosts.ended("p0", nodes["p0"])
