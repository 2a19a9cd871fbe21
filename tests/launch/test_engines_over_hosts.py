"""Engines over two hosts, which are network namespaces: tokens are those of plain SGLang, whatever
path a block took, and when one of an engine's ranks has died or hangs, all begin anew. Pools are
poisoned, and engines keep no prefix of their own."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.testbed.cluster import EngineChange, Gateway, in_cluster, records_on
from benchmarks.testbed.network import OPEN_MBIT, Network, Rates
from common.experiment import Experiment
from launch.cluster import supervisor
from launch.cluster.config import ClusterConfig
from launch.cluster.layout import PAGE_TOKENS, places_of
from tests.cluster import GREEDY, free_port_block, plain_tokens, prompt

BLOCK_BYTES = 8192 * PAGE_TOKENS
PROMPTS = [prompt(65, 65), prompt(1500, 1500)]
FIRST_TURN = prompt(700, 7)
REPLY = 70
SPANS = {
    "P": ("--tp 2 --nnodes 2", ""),
    "D": ("", "--tp 2 --nnodes 2"),
    "both": ("--tp 2 --nnodes 2", "--tp 2 --nnodes 2"),
}
NEW_START_S = 240
FORGETFUL = EngineChange(experiment=Experiment(poison_kv=True, keep_prefixes=False))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
]

Plain = Callable[[list[int], int], list[int]]
Work = Callable[[Gateway, Network], Awaitable[None]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Plain:
    """Tokens of plain SGLang with two ranks, which has ended by then."""
    turns = [FIRST_TURN]
    known = {}
    with plain_tokens(tmp_path_factory.mktemp("plain"), "--tp", "2") as generate:
        for ids in PROMPTS:
            known[len(ids), 16] = generate(ids)
        known[len(FIRST_TURN), REPLY] = generate(FIRST_TURN, max_new_tokens=REPLY)
        turns.append(second_turn(known[len(FIRST_TURN), REPLY]))
        known[len(turns[1]), 16] = generate(turns[1])
    return lambda ids, new_tokens: known[len(ids), new_tokens]


def second_turn(reply: list[int]) -> list[int]:
    return FIRST_TURN + reply + prompt(30, 8)


def hit_tokens(ids: list[int]) -> int:
    return (len(ids) - 1) // PAGE_TOKENS * PAGE_TOKENS


def serve(folder: Path, spans: str, work: Work) -> None:
    """Do the work at a cluster of which these engines are over two hosts."""
    prefill_args, decode_args = (tuple(flags.split()) for flags in SPANS[spans])
    port = free_port_block(500)
    config = ClusterConfig(
        model="tiny",
        port=port,
        device="cpu",
        transfer="tcp",
        dram_bytes=200 * BLOCK_BYTES,
        ssd_bytes=0,
        remote=f"file://{folder}/remote",
        load_policy="always",
        max_total_tokens=20480,
        prefill_args=prefill_args,
        decode_args=decode_args,
        log_dir=str(folder / "logs"),
    )
    network = Network(list(places_of(config)), Rates(OPEN_MBIT, OPEN_MBIT))
    network.build()
    try:
        changes = dict.fromkeys(places_of(config), FORGETFUL)
        records = records_on(network, config, changes)

        async def at(gateway: Gateway) -> None:
            await work(gateway, network)

        with network.entered():
            asyncio.run(in_cluster(records, config, print, at))
    finally:
        network.remove()


async def check(gateway: Gateway, plain: Plain, ids: list[int], new_tokens: int = 16) -> Any:
    """Asks, compares the tokens, and returns how many were cached, and the trace."""
    params = {**GREEDY, "max_new_tokens": new_tokens}
    answer, trace = await gateway.generate({"input_ids": ids, "sampling_params": params})
    assert answer["output_ids"] == plain(ids, new_tokens), (len(ids), trace)
    return answer["meta_info"]["cached_tokens"], trace


async def check_hits(gateway: Gateway, plain: Plain) -> set[str]:
    """Every prompt is answered from the store; returns who read some of it."""
    readers: set[str] = set()
    for ids in PROMPTS:
        cached, trace = await check(gateway, plain, ids)
        assert cached == hit_tokens(ids)
        hit_bytes = cached // PAGE_TOKENS * BLOCK_BYTES
        assert trace["delivered_bytes"] == {"p0": hit_bytes, "d0": hit_bytes}
        readers |= {name for name, share in trace["readers"].items() if share["blocks"]}
    return readers


@pytest.mark.parametrize("spans", SPANS)
def test_an_engine_over_two_hosts_answers_as_one(tmp_path, plain, spans):
    async def work(gateway: Gateway, network: Network) -> None:
        for ids in PROMPTS:
            assert (await check(gateway, plain, ids))[0] == 0
        await check(gateway, plain, FIRST_TURN, REPLY)
        await gateway.wait_stored()
        for policy in ("prefill", "decode"):
            await gateway.set_policy(policy)
            await check_hits(gateway, plain)
        await gateway.set_policy("n-way")
        readers = await check_hits(gateway, plain)
        assert readers == {f"agent-{node}" for node in network.nodes}, "each host reads its share"
        turn = second_turn(plain(FIRST_TURN, REPLY))
        cached, _ = await check(gateway, plain, turn)
        assert cached == (len(FIRST_TURN) + REPLY - 1) // PAGE_TOKENS * PAGE_TOKENS
        gateway.check_alive()

    serve(tmp_path, spans, work)


@pytest.fixture
def noticed_soon(monkeypatch) -> None:
    monkeypatch.setattr(supervisor, "PROBE_PERIOD_S", 2.0)


@pytest.mark.parametrize("engine", ["p0", "d0"])
def test_a_rank_that_dies_or_hangs_takes_the_others_along(tmp_path, plain, noticed_soon, engine):
    async def work(gateway: Gateway, network: Network) -> None:
        await check(gateway, plain, PROMPTS[1])
        await gateway.wait_stored()
        # Its own HTTP server, SGLang's stand-in for one, goes on to answer.
        for number in (signal.SIGKILL, signal.SIGSTOP):
            before = await incarnation(gateway, engine)
            rank = scheduler_in(network.namespace(f"{engine}-1"))
            other = scheduler_in(network.namespace(engine))
            os.kill(rank.pid, number)
            async with asyncio.timeout(NEW_START_S):
                while await incarnation(gateway, engine) <= before:
                    await asyncio.sleep(0.5)
            assert is_gone(rank) and is_gone(other)
            cached, _ = await check(gateway, plain, PROMPTS[1])
            assert cached == hit_tokens(PROMPTS[1])

    serve(tmp_path, "P" if engine == "p0" else "D", work)


async def incarnation(gateway: Gateway, engine: str) -> int:
    """Of the one that lives; -1 if none does."""
    engines = (await gateway.cluster())["engines"]
    return next((e["incarnation"] for e in engines if e["name"] == engine and e["alive"]), -1)


def scheduler_in(namespace: str) -> psutil.Process:
    (found,) = schedulers_in(namespace)
    return found


def schedulers_in(namespace: str) -> Iterator[psutil.Process]:
    """Processes of SGLang's in which a rank computes."""
    for pid in pids_in(namespace):
        process = psutil.Process(pid)
        if any("scheduler" in word for word in process.cmdline()[:1]):
            yield process


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def pids_in(namespace: str) -> list[int]:
    here = os.stat(f"/run/netns/{namespace}").st_ino
    return [pid for pid in psutil.pids() if netns_of(pid) == here]


def netns_of(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:  # it ended meanwhile
        return -1
