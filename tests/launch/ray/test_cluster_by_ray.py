"""A cluster on two hosts that Ray starts, with a prefill engine over both and a standby gateway: it
serves the tokens of plain SGLang, and loses a host, then the active gateway; nodes are added, and
drained with requests under way; its end leaves nothing."""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.testbed.network import entered
from tests.cluster import GREEDY, Cluster, PlainTokens, get, prompt, shared_plain
from tests.control import SECRET
from tests.launch.ray.hosts import RayHosts, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.whole,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"
    ),
]

ROLES = {"a": "prefill", "b": "decode"}
START_TIMEOUT_S = 240
PROFILE = """
all: {{model: tiny, device: cpu, transfer: tcp, dram-bytes: 64MiB, ssd-bytes: 0,
      max-total-tokens: 20480, poison-kv: true, prefill-args: --tp 2,
      remote: {remote}, log-dir: {logs}}}
pools:
  gateway: {{count: 2, cpus: 0.5}}
  prefill: {{nnodes: 2, cpus: 0.5}}
  decode: {{cpus: 0.5, labels: {{dualpath-role: decode}}}}
"""
FIRST_TOKENS = 700
FIRST = prompt(FIRST_TOKENS, seed=1)
LONG = {**GREEDY, "max_new_tokens": 300}


def second_turn(reply: list[int]) -> list[int]:
    return FIRST + reply + prompt(30, seed=2)


@pytest.fixture
def plain() -> PlainTokens:
    """Tokens of plain SGLang, all known before: from the hosts it is not reached."""
    tokens = shared_plain()
    tokens(second_turn(tokens(FIRST)))
    tokens(FIRST, **LONG)
    return tokens


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[RayHosts]:
    hosts = RayHosts(ROLES, tmp_path)
    try:
        hosts.build()
        with entered(hosts.network.namespace("a")):  # the gateway's host, whose operators we are
            yield hosts
    finally:
        hosts.remove()


def driver(hosts: RayHosts) -> Cluster:
    profile = hosts.folder / "hosts.yaml"
    remote, logs = (hosts.folder / "remote").as_uri(), hosts.folder / "logs"
    profile.write_text(PROFILE.format(remote=remote, logs=logs))
    process = hosts.driver(f"--hosts={profile}", "--path-policy=n-way", "--load-policy=always")
    return Cluster(process, f"http://{hosts.address('a')}:30000", hosts.folder)


def wait_engines(cluster: Cluster, hosts: RayHosts, *names: str) -> None:
    try:
        cluster.wait_until(
            lambda: cluster.incarnations("engines").keys() == set(names), START_TIMEOUT_S, "engines"
        )
    except (TimeoutError, RuntimeError) as error:
        raise AssertionError(f"{names} are not there: {error}\n{hosts.said()[-6000:]}") from None
    cluster.wait_healthy()


def let_lead(hosts: RayHosts, name: str, other: str) -> None:
    """The gateway there is active, and the other its standby: killed, if it was active."""

    def standings() -> tuple[str, ...]:
        try:
            urls = [f"http://{hosts.address(host)}:30000/health" for host in (name, other)]
            return tuple(json.loads(get(url, timeout_s=1)[1])["status"] for url in urls)
        except OSError:
            return ("silent",)

    until(lambda: standings().count("standby") == 1, hosts.said)
    if standings()[0] == "standby":
        hosts.kill(other, "-m launch.gateway")
    until(lambda: standings()[1:] == ("standby",) != standings()[:1], hosts.said)


def end(hosts: RayHosts, process: subprocess.Popen[bytes]) -> None:
    for pid in hosts.pids("a", "launch.cluster"):
        os.kill(pid, signal.SIGTERM)
    assert process.wait(START_TIMEOUT_S) == 0, hosts.said()[-6000:]


def test_a_cluster_that_ray_starts(plain: PlainTokens, hosts: RayHosts) -> None:
    hosts.start_ray("a")
    hosts.start_ray("b")
    cluster = driver(hosts)
    let_lead(hosts, "a", other="b")
    wait_engines(cluster, hosts, "p0", "d0")
    answer = cluster.generate(FIRST)
    assert answer.output_ids == plain(FIRST)
    cluster.wait_stored()
    cluster.flush_engines()
    second = second_turn(answer.output_ids)

    def second_turn_hits() -> None:
        answer = cluster.generate(second)
        assert answer.output_ids == plain(second)
        assert answer.cached_tokens >= FIRST_TOKENS // 64 * 64

    second_turn_hits()
    assert SECRET not in hosts.said()

    # A host is lost with all that is on it, and comes back; another engine is to start there.
    before = cluster.incarnations("engines")
    hosts.kill("b", "raylet/raylet")
    until(lambda: not hosts.pids("b", "launch.node"), lambda: "a node outlives its raylet")
    # Of engines that are killed with their node SGLang's shared memory may stay.
    killed = {each for each in hosts.left() if "sglang_loads_" in each}
    hosts.start_ray("b")
    assert "done: " in hosts.scale("--decode=+1")
    wait_engines(cluster, hosts, "p0", "d0", "d1")
    now = cluster.incarnations("engines")
    assert now["d0"] > before["d0"] and now["p0"] > before["p0"], "it was begun anew whole"
    cluster.flush_engines()
    second_turn_hits()

    # One engine less, while requests are under way at both.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(cluster.generate, FIRST, sampling_params=LONG) for _ in range(4)]
        cluster.wait_until(lambda: cluster.state()["open_plans"] > 1, 60, "requests run")
        assert "done: " in hosts.scale("--decode=-1")
        expected = plain(FIRST, **LONG)
        assert all(request.result(START_TIMEOUT_S).output_ids == expected for request in running)
    wait_engines(cluster, hosts, "p0", "d0")

    # The active gateway is lost: the other one serves, and is followed by the one that is back.
    let_lead(hosts, "b", other="a")
    standby = Cluster(cluster.process, f"http://{hosts.address('b')}:30000", hosts.folder)
    assert standby.generate(FIRST).output_ids == plain(FIRST)
    end(hosts, cluster.process)
    assert set(hosts.left()) <= killed
