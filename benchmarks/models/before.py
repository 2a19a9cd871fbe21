"""Plain models' speed beside that of a tree before there were parts, in turns in one run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.models.cluster import START_TIMEOUT_S, Cluster, beside, session
from benchmarks.models.conversations import VOCABULARY
from benchmarks.own_cluster import ClusterFailed, own_cluster

KIB = 1 << 10
BLOCK_BYTES = (64 * KIB, 1024 * KIB, 4096 * KIB)
SET_BYTES = 256 << 20
"""What is stored at each block size."""
ROUNDS = 11
HIT_TOKENS = 4096
"""32 MiB, of agents' DRAM."""
DELIVERIES = 16
STORE_READS, STORE_WRITES, DELIVERY = "store, reads", "store, writes", "delivery of one hit"
_THIS_TREE = Path(__file__).parents[2]
_WORKER = Path(__file__).with_name("store_worker.py")
_KINDS = {"read": STORE_READS, "write": STORE_WRITES}

Pairs = list[tuple[float, float]]
"""Speeds of this tree and of the one before, measured one after the other."""


def compare(before: Path, scratch: Path, speeds: dict[str, Pairs]) -> None:
    """Adds speeds by what was measured, of the store by the size of blocks too. Raises
    :class:`ClusterFailed`."""
    trees = (_THIS_TREE, before)
    for block_bytes in BLOCK_BYTES:
        speeds |= _store_speeds(trees, scratch, block_bytes)
    speeds[DELIVERY] = asyncio.run(_delivery_speeds(trees))


def ratio_of(speeds: dict[str, Pairs], name: str) -> float | None:
    """This tree's speed over the other's: the median of pairs; of block sizes the mean."""
    found = [
        statistics.median(now / before for now, before in pairs)
        for key, pairs in speeds.items()
        if key.startswith(name)
    ]
    return statistics.geometric_mean(found) if found else None


def _in_turns(number: int) -> list[int]:
    """Which of two comes first: each as often."""
    return [0, 1] if number % 2 else [1, 0]


# ---- the store ------------------------------------------------------------------------------


def _store_speeds(trees: tuple[Path, Path], scratch: Path, block_bytes: int) -> dict[str, Pairs]:
    speeds: dict[str, Pairs] = {}
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(_worker(tree, scratch / f"store{number}", block_bytes))
            for number, tree in enumerate(trees)
        ]
        for number in range(ROUNDS):
            for what, kind in _KINDS.items():
                rates = {which: _rate(workers[which], what) for which in _in_turns(number)}
                pairs = speeds.setdefault(f"{kind}, {block_bytes // KIB} KiB", [])
                pairs.append((rates[0], rates[1]))
    return speeds


@contextlib.contextmanager
def _worker(tree: Path, folder: Path, block_bytes: int) -> Iterator[subprocess.Popen[str]]:
    # -P: the folder of the script, which is this tree's, is not looked into.
    blocks = SET_BYTES // block_bytes
    process = subprocess.Popen(
        [sys.executable, "-P", str(_WORKER), str(folder), str(block_bytes), str(blocks)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()
            shutil.rmtree(folder, ignore_errors=True)


def _rate(worker: subprocess.Popen[str], what: str) -> float:
    """Bytes a second."""
    if worker.stdin is None or worker.stdout is None:
        raise ClusterFailed("no pipe")
    print(what, file=worker.stdin, flush=True)
    said = worker.stdout.readline()
    if not said:
        raise ClusterFailed(f"{_WORKER.name} ended with {worker.wait()}")
    return float(said)


# ---- deliveries -----------------------------------------------------------------------------


async def _delivery_speeds(trees: tuple[Path, Path]) -> Pairs:
    """Deliveries a second of one hit into the idle engines of two clusters."""
    flags = ["--dram-bytes", "512MiB", "--max-total-tokens", str(2 * HIT_TOKENS)]
    flags += ["--ssd-bytes", "0"]
    prompt, pairs = random.Random(1).choices(VOCABULARY, k=HIT_TOKENS + 1), []
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(session())
        clusters = []
        for tree in trees:
            start = own_cluster("decode", flags, START_TIMEOUT_S, tree=tree)
            cluster = Cluster(await stack.enter_async_context(beside(start)), Path(), http)
            stack.push_async_callback(cluster.operator.close)
            await _warm(cluster, prompt)
            clusters.append(cluster)
        for number in range(DELIVERIES):
            speeds = {
                which: await _delivery(clusters[which], prompt) for which in _in_turns(number)
            }
            pairs.append((speeds[0], speeds[1]))
    return pairs


async def _delivery(cluster: Cluster, prompt: list[int]) -> float:
    await cluster.flush()
    answer = await cluster.ask(prompt, 1)
    if answer.cached_tokens != HIT_TOKENS:
        raise ClusterFailed(f"a hit of {answer.cached_tokens} tokens")
    seconds: float = answer.trace["timings_s"]["deliver"]
    return 1 / seconds


async def _warm(cluster: Cluster, prompt: list[int]) -> None:
    """Until all of the prompt is a hit."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while (await cluster.ask(prompt, 1)).cached_tokens != HIT_TOKENS:
        if time.monotonic() > deadline:
            raise ClusterFailed(f"{cluster.url} has no hit of {HIT_TOKENS} tokens")
        await asyncio.sleep(1)
        await cluster.flush()
