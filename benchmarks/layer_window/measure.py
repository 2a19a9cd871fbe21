"""What is measured, in order: open links first, then links that are the limit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import psutil

from benchmarks.layer_window import cores
from benchmarks.layer_window.arms import (
    CONTEXT_TOKENS,
    CONTEXTS,
    DECODE,
    ENGINES,
    LAYERS,
    NEW_TOKENS,
    ONE_REQUEST_TOKENS,
    TOKEN_BYTES,
    WINDOW,
    Arms,
    Sample,
)
from benchmarks.testbed.iperf import compute_rates
from benchmarks.testbed.network import OPEN_MBIT, Network

ARMS = ("all", "window", "whole")
PAIRS = 15
"""Of single requests, to all arms in turn."""
ROUNDS, BATCH = 2, 16
"""Of the throughput race: requests at once, twice."""
WARM_UPS = 1
RACE_SINGLES = 3
"""Requests alone on the race's link, to each arm."""
SLOW_REQUESTS = 5
IPERF_S = 2
COLD_PAIRS, COLD_TOKENS = 5, 3000
SAMPLE_S = 0.5
ALONE, COMPARED = WARM_UPS + PAIRS + RACE_SINGLES, PAIRS + ROUNDS * BATCH
STEPS = CONTEXTS + len(ARMS) * (ALONE + ROUNDS * BATCH) + COMPARED + SLOW_REQUESTS + 2 * COLD_PAIRS


class Wait(msgspec.Struct):
    """What forwards of the window have waited for KV."""

    per_layer_s: list[float]
    """Seconds a forward."""
    of_forward: float
    """Share of the forwards' time, the first W layers aside."""


class Race(msgspec.Struct):
    """One arm's forwards over all rounds of the race."""

    forwards: float
    forward_s: float
    waited_s: tuple[float, ...]
    """Of it, for KV, by layer."""
    elapsed_s: float
    """Of the rounds; what is not in forwards lies between them."""


class Results(msgspec.Struct):
    """Everything; fields stay None until they are measured."""

    kv_bytes_ratio: float | None = None
    other_tokens: int | None = None
    batch_ratio: float | None = None
    prefill_ratio: float | None = None
    first_s: dict[str, float] = {}
    race_mbit: float | None = None
    race_first_s: dict[str, float] = {}
    """Time to first token of a request alone on the race's link."""
    throughput_ratio: float | None = None
    whole_ratio: float | None = None
    """Throughput of the window, of loading whole requests."""
    throughput_per_s: dict[str, list[float]] = {}
    race: dict[str, Race] = {}
    open_wait: Wait | None = None
    slow_mbit: float | None = None
    slow_iperf_mbit: float | None = None
    """Payload that iperf3 gets through that link."""
    slow_wait_s: float | None = None
    slow_excess_s: float | None = None
    """Of loading over computing: the wait that cannot be hidden."""
    slow_wait: Wait | None = None
    cold_first_s: dict[str, float] = {}
    held_bytes: dict[str, list[tuple[float, int]]] = {}
    """KV bytes of the pool in use over the race, by arm."""


class Measurement:
    """Fills :class:`Results` step by step, so that a failure leaves what was measured."""

    def __init__(self, network: Network, results: Results) -> None:
        self._network = network
        self.results = results
        self._answers: list[tuple[list[int], tuple[int, ...]]] = []
        """Prompts and what ``all`` has said."""

    async def run(self, arms: Arms) -> None:
        """Everything."""
        await arms.store_contexts()
        await self._singles(arms, WARM_UPS)
        cores.keep_apart(psutil.Process(), sorted(os.sched_getaffinity(0)))
        compute_s = await self._pairs(arms)
        load_bytes = CONTEXT_TOKENS * TOKEN_BYTES
        await self._race(arms, load_bytes * 8 / compute_s / 1e6)
        await self._cold(arms)
        await self._compare(arms)
        await self._slow(arms, load_bytes, compute_s)

    async def _pairs(self, arms: Arms) -> float:
        """Single requests over open links; returns the seconds of a forward's computation."""
        before = await arms.counters("window")
        samples, asked = await self._singles(arms, PAIRS)
        counted = (await arms.counters("window")).since(before)
        pairs = list(zip(samples["window"], samples["all"], strict=True))
        results = self.results
        self._answers += zip(asked, (sample.output for sample in samples["all"]), strict=True)
        results.prefill_ratio = statistics.median(a.first_s / b.first_s for a, b in pairs)
        results.first_s = _first_s(samples)
        results.open_wait = _wait(counted)
        own, other = await arms.counters("window"), await arms.counters("all")
        # The window's pool has L/W times the tokens; at equal tokens it would be this large.
        results.kv_bytes_ratio = own.kv_bytes / (LAYERS / WINDOW) / other.kv_bytes
        return counted.compute_s / counted.forwards

    @staticmethod
    async def _singles(arms: Arms, count: int) -> tuple[dict[str, list[Sample]], list[list[int]]]:
        """So many requests to each arm, one at a time, the arms in turn; also what ``all`` was
        asked. Each has new tokens of its own: those of another arm would be stored by now."""
        samples: dict[str, list[Sample]] = {arm: [] for arm in ARMS}
        asked = []
        for number in range(count):
            for arm in ARMS[:: -1 if number % 2 else 1]:
                prompt = arms.request(number)
                await arms.use(arm)
                samples[arm].append(await arms.send(prompt))
                if arm == "all":
                    asked.append(prompt)
        return samples, asked

    async def _race(self, arms: Arms, rate_mbit: float) -> None:
        """Many requests at once, on a link that loads one while one computes."""
        results = self.results
        results.race_mbit = rate_mbit
        self._network.set_compute_rate(rate_mbit)
        results.race_first_s = _first_s((await self._singles(arms, RACE_SINGLES))[0])
        before = {arm: await arms.counters(arm) for arm in ARMS}
        for number in range(ROUNDS):
            for arm in ARMS[:: -1 if number % 2 else 1]:
                batch = [arms.request(i) for i in range(BATCH)]
                await arms.use(arm)
                async with self._held_bytes(arms, arm):
                    samples, seconds = await arms.send_all(batch)
                if arm == "all":
                    self._answers += zip(batch, (s.output for s in samples), strict=True)
                results.throughput_per_s.setdefault(arm, []).append(BATCH / seconds)
        results.throughput_ratio = self._throughput_of("all")
        results.whole_ratio = self._throughput_of("whole")
        counters = {arm: await arms.counters(arm) for arm in ARMS}
        for arm, counted in counters.items():
            own = counted.since(before[arm])
            elapsed_s = sum(BATCH / rate for rate in results.throughput_per_s[arm])
            results.race[arm] = Race(own.forwards, own.forward_s, own.waited_s, elapsed_s)
        largest = counters["window"].requests_max / counters["all"].requests_max
        results.batch_ratio = largest / (LAYERS / WINDOW)

    def _throughput_of(self, base: str) -> float:
        """The window's, of another arm's in the same round."""
        rates = self.results.throughput_per_s
        return statistics.median(w / b for w, b in zip(rates["window"], rates[base], strict=True))

    async def _compare(self, arms: Arms) -> None:
        """Ask the window what ``all`` was asked: it loads what ``all`` computed but for the last
        block, and has to say the same."""
        self._network.set_compute_rate(OPEN_MBIT)
        await arms.use("window")
        samples, _ = await arms.send_all([prompt for prompt, _ in self._answers])
        self.results.other_tokens = sum(
            sample.output != output
            for sample, (_, output) in zip(samples, self._answers, strict=True)
        )

    @contextlib.asynccontextmanager
    async def _held_bytes(self, arms: Arms, arm: str) -> AsyncIterator[None]:
        """Sample the pool while something runs; the last run of an arm is kept."""
        layers = WINDOW if arm == "window" else LAYERS
        pool = ONE_REQUEST_TOKENS * LAYERS // layers
        held: list[tuple[float, int]] = []
        began = time.monotonic()

        async def sample() -> None:
            while True:
                used = pool - await arms.free_tokens(arm)
                held.append((time.monotonic() - began, used * TOKEN_BYTES * layers // LAYERS))
                await asyncio.sleep(SAMPLE_S)

        task = asyncio.create_task(sample())
        try:
            yield
        finally:
            task.cancel()
            self.results.held_bytes[arm] = held

    async def _cold(self, arms: Arms) -> None:
        """Time to the first token of a prompt that nobody has, all of whose KV goes to D, on the
        race's link."""
        first: dict[str, list[float]] = {"all": [], "whole": []}
        for number in range(COLD_PAIRS):
            for arm in ("all", "whole") if number % 2 else ("whole", "all"):
                await arms.use(arm)
                first[arm].append((await arms.send(arms.prompt(COLD_TOKENS))).first_s)
        self.results.cold_first_s = {arm: statistics.median(s) for arm, s in first.items()}

    async def _slow(self, arms: Arms, load_bytes: int, compute_s: float) -> None:
        """Single requests on a link that takes twice as long to load as they compute."""
        results = self.results
        results.slow_mbit = load_bytes * 8 / (2 * compute_s) / 1e6
        self._network.set_compute_rate(results.slow_mbit)
        nodes = [DECODE, ENGINES["window"]]
        rate = (await asyncio.to_thread(compute_rates, self._network, nodes, IPERF_S))[nodes[1]]
        results.slow_iperf_mbit = rate * 8 / 1e6
        await arms.use("window")
        before = await arms.counters("window")
        for number in range(SLOW_REQUESTS):
            await arms.send(arms.request(number))
        counted = (await arms.counters("window")).since(before)
        self._network.set_compute_rate(OPEN_MBIT)
        waited_s = sum(counted.waited_s) / counted.forwards
        computed_s = counted.compute_s / counted.forwards
        results.slow_wait_s = waited_s
        results.slow_excess_s = max(0.0, load_bytes / rate - computed_s)
        results.slow_wait = _wait(counted)


def _first_s(samples: dict[str, list[Sample]]) -> dict[str, float]:
    return {arm: statistics.median(s.first_s for s in taken) for arm, taken in samples.items()}


def _wait(counted: Any) -> Wait:
    per_layer = [seconds / counted.forwards for seconds in counted.waited_s]
    return Wait(per_layer, sum(counted.waited_s[WINDOW:]) / counted.forward_s)


def describe() -> dict[str, Any]:
    """What was run."""
    return {
        "layers": LAYERS,
        "window": WINDOW,
        "context_tokens": CONTEXT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "pool_tokens_of_all": ONE_REQUEST_TOKENS,
        "pairs": PAIRS,
        "race": f"{ROUNDS} rounds of {BATCH} requests an arm",
    }
