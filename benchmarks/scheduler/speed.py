"""Plans a second on one core: the policy alone, and with the directory.

Times are the thread's CPU time: they say what one core can do, also on a machine that has
other work. The 99th percentile of the wall-clock time stands beside them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, repeat

import msgspec
import numpy as np

from benchmarks.scheduler.cluster import Cluster, RemoteStore, some_keys
from common.block import KEY_BYTES, BlockKey, TierName
from common.ids import Incarnation
from common.messages.from_agents import Holding
from scheduler.directory.directory import Directory
from scheduler.plan import Plan

PROMPT_TOKENS = 64 * 1024
NEW_TOKENS = 176
HIT_BLOCKS = 1000
"""Of the prompt's 1,023 full blocks: 98 %, as in the paper's traces."""
OPEN_PLANS_A_NODE = 2
REPORT_PERIOD_S = 1.0
CLOCK_PLANS_PER_S = 5000
"""The simulated clock: at this rate requests come, and between them every process reports."""


class Speed(msgspec.Struct, frozen=True):
    """Of ``plan()`` alone; and whole cycles a second: plan, shares settled, submitted,
    finished, and the reports that come meanwhile. Rates are medians over the rounds."""

    plan_p50_ms: float
    plan_p99_ms: float
    plan_p99_wall_ms: float
    plans_per_s: float
    cycles_per_s: float

    def scaled(self, scale: float) -> Speed:
        """On a machine where each of these CPU times is ``scale`` times as long."""
        return Speed(
            self.plan_p50_ms * scale,
            self.plan_p99_ms * scale,
            self.plan_p99_wall_ms * scale,
            self.plans_per_s / scale,
            self.cycles_per_s / scale,
        )


class PlanLoop:
    """Requests to one scheduler, one after the other; the oldest open one ends as a new one
    comes, and every process reports once a second of the simulated clock."""

    def __init__(self, cluster: Cluster, keys: Iterator[list[BlockKey]]) -> None:
        """``keys``: of one request after the other."""
        self._cluster = cluster
        self._keys = keys
        self._now = 0.0
        self._nodes = len(cluster.engines)
        self._open: deque[Plan] = deque()
        self._reports_due = 0.0
        self._next_report = 0
        self._plan_s: list[float] = []
        self._plan_wall_s: list[float] = []
        self.plans_per_s: list[float] = []
        """By round, as the next one."""
        self.cycles_per_s: list[float] = []
        for _ in range(OPEN_PLANS_A_NODE * self._nodes):
            self._one(next(keys))
        self._plan_s.clear()
        self._plan_wall_s.clear()

    def round(self, plans: int) -> None:
        """So many requests."""
        cycles_s, first = 0.0, len(self._plan_s)
        for _ in range(plans):
            keys = next(self._keys)
            begun_s = time.thread_time()
            self._one(keys)
            cycles_s += time.thread_time() - begun_s
        self.plans_per_s.append(plans / sum(self._plan_s[first:]))
        self.cycles_per_s.append(plans / cycles_s)

    def speed(self) -> Speed:
        return Speed(
            float(np.percentile(self._plan_s, 50)) * 1e3,
            float(np.percentile(self._plan_s, 99)) * 1e3,
            float(np.percentile(self._plan_wall_s, 99)) * 1e3,
            float(np.median(self.plans_per_s)),
            float(np.median(self.cycles_per_s)),
        )

    def _one(self, keys: list[BlockKey]) -> None:
        cluster, scheduler = self._cluster, self._cluster.scheduler
        self._now += 1 / CLOCK_PLANS_PER_S
        request = cluster.request("r", keys, PROMPT_TOKENS, NEW_TOKENS)
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        plan = scheduler.plan(request, self._now)
        self._plan_s.append(time.thread_time() - cpu_s)
        self._plan_wall_s.append(time.perf_counter() - wall_s)
        for agent, share in plan.shares().items():
            scheduler.share_settled(plan.id, agent, [True] * len(share), self._now)
        scheduler.submitted(plan.id, self._now)
        self._open.append(plan)
        if len(self._open) > OPEN_PLANS_A_NODE * self._nodes:
            scheduler.finished(self._open.popleft().id, self._now)
        self._report()

    def _report(self) -> None:
        self._reports_due += self._nodes / REPORT_PERIOD_S / CLOCK_PLANS_PER_S
        while self._reports_due >= 1:
            self._reports_due -= 1
            node = self._next_report = (self._next_report + 1) % self._nodes
            self._cluster.report_engine(node, self._now, OPEN_PLANS_A_NODE)
            self._cluster.report_agent(node, self._now)


def policy_alone(prefill: int, decode: int) -> PlanLoop:
    """n-way over a cluster of this size; every block is remote, and nothing is looked up."""
    cluster = Cluster("n-way", prefill, decode)
    cluster.scheduler.directory = RemoteStore()
    keys = some_keys(HIT_BLOCKS)
    return PlanLoop(cluster, iter(lambda: keys, None))


def with_directory(
    prefill: int, decode: int, directory: Directory, keys: Iterator[list[BlockKey]]
) -> PlanLoop:
    """The same with a look-up: every request has the keys of another prompt."""
    cluster = Cluster("n-way", prefill, decode)
    cluster.scheduler.directory = directory
    return PlanLoop(cluster, keys)


def full_directory(
    blocks: int, progress: Callable[[float], None]
) -> tuple[Directory, Iterator[list[BlockKey]]]:
    """A directory with as many blocks in the remote store, in prompts of ``HIT_BLOCKS``; and
    the prompts' keys, in random order, endlessly. ``progress`` is told the part that is done."""
    directory, prompts = Directory(blocks), blocks // HIT_BLOCKS
    for prompt in range(prompts):
        changes = [Holding(key, TierName.REMOTE, True) for key in _prompt_keys(prompt)]
        directory.apply("agent-p0", Incarnation(1), prompt, prompt == 0, changes)
        progress((prompt + 1) / prompts)
    order = np.random.default_rng(1).permutation(prompts).tolist()
    return directory, map(_prompt_keys, chain.from_iterable(repeat(order)))


def _prompt_keys(prompt: int) -> list[BlockKey]:
    """A prompt's keys, the same again whenever asked, so that they need not be kept."""
    raw = np.random.default_rng(prompt).bytes(HIT_BLOCKS * KEY_BYTES)
    return [BlockKey(raw[at : at + KEY_BYTES]) for at in range(0, len(raw), KEY_BYTES)]
