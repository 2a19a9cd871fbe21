"""Part two: the trace's requests, shrunk, on real engines; arms by turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp
import msgspec
import numpy as np

from benchmarks.own_cluster import free_port
from benchmarks.quota.engines import (
    RANKS,
    REQUEST_TIMEOUT_S,
    START_TIMEOUT_S,
    Batch,
    Client,
    Engine,
    Group,
    groups,
)
from benchmarks.quota.estimate import max_over_mean
from benchmarks.quota.workload import scaled
from benchmarks.supervised import Supervised, while_running
from scheduler.quota import Chunk

QUOTA_MS = 200.0
TOKENS_MAX = 8192
FIXED_TOKENS = 896
"""About as many as a batch of the quota has in the mean."""
LENGTH_DIVISOR = 8
CONTEXT_MAX, NEW_MAX = 8192, 4096
PARTS = 5
"""Of the requests: each round has one, the next round the next one."""


class Round(msgspec.Struct, frozen=True):
    """One arm's turn: the same lengths for both arms of a round, tokens of its own."""

    arm: str
    new_tokens: int
    seconds: float
    cpu_s: float
    """Of the prefill engines' scheduler processes."""
    batches: list[list[Batch]]
    """Of each rank, in order."""

    def pairs(self) -> list[tuple[Batch, ...]]:
        """The ranks' first full batches, their second ones, and so on."""
        full = [[batch for batch in rank if batch.full] for rank in self.batches]
        return list(zip(*full, strict=False))


class Measured(msgspec.Struct, frozen=True):
    """What one arm came to over all its rounds."""

    batches: int
    full_batches_compared: int
    mean_tokens: float
    max_avg: float
    """Attention CPU time of the ranks' full batches: sum of the longest over sum of the means."""
    max_avg_estimated: float
    error_median: float
    """Of the estimate, over what was measured."""
    over_quota_p99: float
    forward_max_avg: float
    """The same of whole forwards, by the clock: two cores, and other processes on them."""
    tokens_per_s: float
    tokens_per_cpu_s: float

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> Measured:
        """Of one arm's rounds."""
        every = [batch for turn in rounds for rank in turn.batches for batch in rank]
        pairs = [pair for turn in rounds for pair in turn.pairs()]
        attention = np.array([batch.attention_s for batch in every])
        estimated = np.array([batch.estimated_s for batch in every])
        tokens = sum(turn.new_tokens for turn in rounds)
        return cls(
            batches=len(every),
            full_batches_compared=RANKS * len(pairs),
            mean_tokens=float(np.mean([batch.new_tokens for pair in pairs for batch in pair])),
            max_avg=_max_avg(pairs, "attention_s"),
            max_avg_estimated=_max_avg(pairs, "estimated_s"),
            error_median=float(np.median(np.abs(estimated / attention - 1))),
            over_quota_p99=float(np.quantile(attention, 0.99)) / (QUOTA_MS / 1000),
            forward_max_avg=_max_avg(pairs, "forward_s"),
            tokens_per_s=tokens / sum(turn.seconds for turn in rounds),
            tokens_per_cpu_s=tokens / sum(turn.cpu_s for turn in rounds),
        )


def throughput_ratios(rounds: Sequence[Round], of: Callable[[Round], float]) -> list[float]:
    """Quota over fixed, round by round; ``of`` is the time that counts."""
    quota = [turn.new_tokens / of(turn) for turn in rounds if turn.arm == "quota"]
    fixed = [turn.new_tokens / of(turn) for turn in rounds if turn.arm == "fixed"]
    return [a / b for a, b in zip(quota, fixed, strict=True)]


async def measure(
    requests: Sequence[Chunk], rounds: int, folder: Path, say: Callable[[str], None]
) -> list[Round]:
    """Every round has a part of the requests, and both arms' turns at it.

    Raises ``ClusterFailed`` and ``StartFailed``.
    """
    shrunk = [scaled(chunk, LENGTH_DIVISOR, CONTEXT_MAX, NEW_MAX) for chunk in requests]
    arms, decode = groups(free_port(), folder, QUOTA_MS, FIXED_TOKENS, TOKENS_MAX)
    engines = [decode, *(engine for group in arms for engine in group.engines)]
    supervised = Supervised(say)

    async def work() -> list[Round]:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        # A kept connection may be closed by the engine just when the next turn takes it.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
            return await _rounds(Client(http, decode, supervised), arms, shrunk, rounds, say)

    records = [engine.record for engine in engines]
    return await while_running(records, folder, START_TIMEOUT_S, supervised, work)


async def _rounds(
    client: Client,
    arms: Sequence[Group],
    requests: Sequence[Chunk],
    rounds: int,
    say: Callable[[str], None],
) -> list[Round]:
    for group in arms:
        await client.warm(group, CONTEXT_MAX)
    done: list[Round] = []
    for number in range(rounds):
        prompts = _spread(requests[number % PARTS :: PARTS])
        for group in arms[:: -1 if number % 2 else 1]:
            done.append(await _turn(client, group, prompts))
            say(f"round {number + 1} of {rounds}, {group.name}: {done[-1].seconds:.1f} s")
    return done


async def _turn(client: Client, group: Group, prompts: Sequence[Sequence[Chunk]]) -> Round:
    cpu_s, began = _cpu_s(group.engines), time.monotonic()
    await client.run(group, prompts)
    seconds = time.monotonic() - began
    return Round(
        arm=group.name,
        new_tokens=sum(chunk.new_tokens for rank in prompts for chunk in rank),
        seconds=seconds,
        cpu_s=_cpu_s(group.engines) - cpu_s,
        batches=client.batches(group),
    )


def _cpu_s(engines: Sequence[Engine]) -> float:
    return sum(engine.cpu_s() for engine in engines)


def _spread(requests: Sequence[Chunk]) -> list[list[Chunk]]:
    """To the rank with the fewest tokens waiting, as the gateway does."""
    ranks: list[list[Chunk]] = [[] for _ in range(RANKS)]
    for request in requests:
        min(ranks, key=lambda rank: sum(chunk.new_tokens for chunk in rank)).append(request)
    return ranks


def _max_avg(pairs: Sequence[tuple[Batch, ...]], of: str) -> float:
    return max_over_mean(np.array([[getattr(batch, of) for batch in pair] for pair in pairs]))
