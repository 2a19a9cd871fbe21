"""Engines over two hosts, each a ``launch.node`` in a network namespace of its own: tokens are
those of plain SGLang, whatever path a block took; a host that leaves, dies or hangs takes its
engine with it, which begins anew when the host is back. Pools are poisoned."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launch.cluster.layout import PAGE_TOKENS
from launch.models.resolve import resolve_model
from tests.cluster import Answer, Cluster, post, prompt, shared_plain
from tests.launch.node.hosts import (
    BACK_TIMEOUT_S,
    END_TIMEOUT_S,
    Hosts,
    hosts_of,
    needs_hosts,
    wait_directory,
    wait_for,
)

BLOCK_BYTES = 8192 * PAGE_TOKENS
PROMPTS = [prompt(65, 65), prompt(1500, 1500)]
FIRST_TURN = prompt(700, 7)
REPLY = {"max_new_tokens": 70}
TURN_TOKENS = len(FIRST_TURN) + REPLY["max_new_tokens"]
BLOCKS = sum(len(ids) // PAGE_TOKENS for ids in (*PROMPTS, FIRST_TURN))
DECODED = 48
ROLES = {"p0": "prefill", "d0": "decode"}

pytestmark = [pytest.mark.slow, pytest.mark.whole, pytest.mark.timeout(600), needs_hosts]

Plain = Callable[..., list[int]]


@pytest.fixture(scope="module")
def plain() -> Plain:
    """Tokens of plain SGLang with two ranks, all known before: from the hosts it is not reached."""
    generate = shared_plain("--tp", "2")
    for ids in PROMPTS:
        generate(ids)
    generate(second_turn(generate(FIRST_TURN, **REPLY)))
    return generate


def second_turn(reply: list[int]) -> list[int]:
    return FIRST_TURN + reply + prompt(30, 8)


class SpannedCluster:
    """A cluster whose ``spanned`` engines are over two hosts each: ``p0`` and ``p0-1``."""

    def __init__(self, hosts: Hosts, spanned: tuple[str, ...], *flags: str) -> None:
        self.hosts = hosts
        self.spanned = spanned
        self.flags = flags
        self.agents = [f"agent-{host}" for host in hosts.network.nodes]
        self.nodes = {host: self.start(host) for host in hosts.network.nodes}
        self.gateway: Cluster = self.start_gateway()

    def start(self, host: str) -> subprocess.Popen[bytes]:
        engine, _, rank = host.partition("-")
        flags = self.flags
        if engine in self.spanned:
            meet = f"{self.hosts.network.compute_address(engine)}:29400"
            flags += (f"--name={engine}", "--nnodes=2", f"--node-rank={rank or 0}")
            flags += (f"--dist-init-addr={meet}",)
        return self.hosts.node(host, ROLES[engine], *flags)

    def start_gateway(self) -> Cluster:
        return self.hosts.gateway()

    def kill(self, host: str) -> None:
        """kill -9 of its launch.node, with which all that it has started ends."""
        self.nodes[host].kill()
        self.nodes[host].wait(END_TIMEOUT_S)

    def wait_anew(self, engine: str, before: dict[str, int]) -> None:
        """Until all are there, and the engine begun after those incarnations."""

        def is_new() -> bool:
            return self.gateway.incarnations("engines").get(engine, 0) > before[engine]

        self.gateway.wait_until(is_new, BACK_TIMEOUT_S, f"{engine} has begun anew")
        wait_for(self.gateway, *self.agents, *before)
        wait_directory(self.gateway, BLOCKS)


@contextlib.contextmanager
def cluster_over(folder: Path, spanned: tuple[str, ...], *flags: str) -> Iterator[SpannedCluster]:
    names = [host for engine in ROLES for host in (engine, f"{engine}-1")]
    names = [name for name in names if name in ROLES or name[:2] in spanned]
    with hosts_of(names, folder) as hosts:
        yield SpannedCluster(hosts, spanned, *flags)


def ranks(prefill: int, decode: int) -> list[str]:
    return [f"--prefill-args=--tp {prefill}", f"--decode-args=--tp {decode}"]


def check(cluster: Cluster, plain: Plain, ids: list[int], **params: int) -> Answer:
    answer = cluster.generate(ids, sampling_params=params)
    assert answer.output_ids == plain(ids, **params), (len(ids), answer.trace)
    return answer


def hit_tokens(tokens: int) -> int:
    return (tokens - 1) // PAGE_TOKENS * PAGE_TOKENS


def check_hits(cluster: Cluster, plain: Plain) -> set[str]:
    """Every prompt is answered from the store; returns who read some of it."""
    cluster.flush_engines()
    readers: set[str] = set()
    for ids in PROMPTS:
        answer = check(cluster, plain, ids)
        assert answer.cached_tokens == hit_tokens(len(ids))
        hit_bytes = answer.cached_tokens // PAGE_TOKENS * BLOCK_BYTES
        assert answer.trace["delivered_bytes"] == {"p0": hit_bytes, "d0": hit_bytes}
        readers |= answer.reader_agents
    return readers


def check_identity(cluster: SpannedCluster, plain: Plain) -> None:
    """Cold, from the store by each host's agent, and a second turn."""
    gateway = cluster.gateway
    wait_for(gateway, *cluster.agents, *ROLES)
    for ids in PROMPTS:
        assert check(gateway, plain, ids).cached_tokens == 0
    reply = check(gateway, plain, FIRST_TURN, **REPLY).output_ids
    gateway.wait_stored()
    for reader in cluster.agents:
        for agent in cluster.agents:
            post(f"{gateway.url}/admin/drain", {"name": agent, "on": agent != reader})
        assert check_hits(gateway, plain) == {reader}
    for agent in cluster.agents:
        post(f"{gateway.url}/admin/drain", {"name": agent, "on": False})
    gateway.flush_engines()
    assert check(gateway, plain, second_turn(reply)).cached_tokens == hit_tokens(TURN_TOKENS)


def test_decode_over_two_hosts_of_which_one_hangs(tmp_path, plain) -> None:
    with cluster_over(tmp_path, ("d0",), *ranks(1, 2)) as cluster:
        check_identity(cluster, plain)
        gateway = cluster.gateway
        # SGLang's own process beside the rank goes on to answer.
        before = gateway.incarnations("engines")
        rank, other = (scheduler_on(cluster.hosts, host) for host in ("d0-1", "d0"))
        os.kill(rank.pid, signal.SIGSTOP)
        cluster.wait_anew("d0", before)
        assert is_gone(rank) and is_gone(other)
        check_hits(gateway, plain)


def test_both_over_two_hosts_of_which_the_first_dies_with_the_gateway_and_one_leaves(
    tmp_path, plain
) -> None:
    with cluster_over(tmp_path, ("p0", "d0"), *ranks(2, 2)) as cluster:
        check_identity(cluster, plain)
        before = cluster.gateway.incarnations("engines")
        cluster.kill("p0")
        cluster.gateway.process.kill()
        cluster.gateway.process.wait(END_TIMEOUT_S)
        cluster.nodes["p0"] = cluster.start("p0")
        cluster.gateway = cluster.start_gateway()
        cluster.wait_anew("p0", before)
        check_hits(cluster.gateway, plain)
        # One leaves with a request under way, and comes back.
        gateway, hosts = cluster.gateway, cluster.hosts
        before = gateway.incarnations("engines")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            request = pool.submit(check, gateway, plain, FIRST_TURN, **REPLY)
            gateway.wait_until(lambda: gateway.state()["open_plans"] == 1, 30, "it is planned")
            cluster.nodes["d0-1"].send_signal(signal.SIGTERM)
            request.result(END_TIMEOUT_S)
        hosts.ended("d0-1", cluster.nodes["d0-1"])
        assert "not drained in time" not in hosts.log("d0-1")
        # Its engine waits for it, and is no engine meanwhile; the other host's agent serves.
        wait_for(gateway, *(agent for agent in cluster.agents if agent != "agent-d0-1"), "p0")
        cluster.nodes["d0-1"] = cluster.start("d0-1")
        cluster.wait_anew("d0", before)
        check_hits(gateway, plain)
        for node in cluster.nodes.values():
            node.send_signal(signal.SIGTERM)
        for host, node in cluster.nodes.items():
            hosts.ended(host, node)


def test_attention_groups_on_one_host_and_over_two(tmp_path) -> None:
    """Each group of an engine is an engine: both of P compute in one forward on one host, with a
    window of four of six layers and a quota; both of D decode in one, each with its control port
    and its agent on the host where its ranks begin."""
    # With torch: 4 s of each process that collects tests here.
    from tests.models.by_transformers import greedy

    model = resolve_model("tiny-mla")
    prompts = [prompt(length, length) for length in (65, 700, 1500, 1100)]
    expected = [greedy(model, ids, new_tokens=DECODED) for ids in prompts]
    flags = [f"--model={model}", "--prefill-layer-window=4", "--prefill-quota-ms=60"]
    flags += ["--prefill-args=--tp 2 --attn-dp-size 2 --chunked-prefill-size 1024"]
    flags += ["--decode-args=--enable-dp-attention --tp 2 --dp 2"]  # the older name
    engines = ("p0.0", "p0.1", "d0.0", "d0.1")
    with cluster_over(tmp_path, ("d0",), *flags) as cluster:
        gateway = cluster.gateway
        wait_for(gateway, *cluster.agents, *engines)
        incarnations = gateway.incarnations("engines")
        ask = functools.partial(gateway.generate, sampling_params={"max_new_tokens": DECODED})
        for cached in ([0] * 4, [hit_tokens(len(ids)) for ids in prompts]):
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(ask, prompts))
            assert [answer.output_ids for answer in answers] == expected
            assert [answer.cached_tokens for answer in answers] == cached
            chosen = {answer.trace[role] for answer in answers for role in ("prefill", "decode")}
            assert chosen == set(engines)
            gateway.wait_stored()
            gateway.flush_engines()
        for agent in ("agent-d0", "agent-d0-1"):
            pulled = gateway.metric_sum(f'agent_pulled_bytes_total{{agent="{agent}"')
            assert pulled > 0, "each stores what its own group has computed"
        for group in ("p0.0", "p0.1"):
            for count in ("engine_quota_batches_total", "engine_read_back_pages_total"):
                assert gateway.metric_sum(f'{count}{{engine="{group}"') > 0
        gateway.wait_unharmed(incarnations)


def scheduler_on(hosts: Hosts, host: str) -> psutil.Process:
    """The process of SGLang's in which a rank computes."""
    [found] = [
        process
        for process in map(psutil.Process, hosts.processes(host))
        if any("schedul" in word for word in process.cmdline()[:1])
    ]
    return found


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
