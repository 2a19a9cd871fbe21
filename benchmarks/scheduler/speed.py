"""Plans a second on one core: the policy alone, and with the directory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from benchmarks.scheduler.cluster import Cluster, RemoteStore, some_keys
from scheduler.plan import Plan
from storage.block import KEY_BYTES, BlockKey
from storage.tier import TierName

PROMPT_TOKENS = 64 * 1024
NEW_TOKENS = 176
HIT_BLOCKS = 1000
"""Of the prompt's 1,023 full blocks: 98 %, as in the paper's traces."""
OPEN_PLANS_A_NODE = 8
REPORT_PERIOD_S = 1.0
CLOCK_PLANS_PER_S = 5000
"""The simulated clock: at this rate requests come, and between them every process reports."""


class Speed(msgspec.Struct, frozen=True):
    """Times of ``plan()``, and the rate of whole cycles: plan, shares settled, submitted,
    finished, and the reports that come meanwhile."""

    plan_p50_ms: float
    plan_p99_ms: float
    plans_per_s: float
    cycles_per_s: float


def measure(cluster: Cluster, keys: Iterator[list[BlockKey]], plans: int) -> Speed:
    """Plan ``plans`` requests, one for each list of keys, in a steady state of open ones."""
    loop = _Loop(cluster)
    for _ in range(loop.open_max + plans // 10):
        loop.one(next(keys))
    loop.plan_s.clear()
    begun_s, outside_s = time.thread_time(), 0.0
    for _ in range(plans):
        waited_s = time.thread_time()
        wanted = next(keys)
        outside_s += time.thread_time() - waited_s
        loop.one(wanted)
    cycles_s = time.thread_time() - begun_s - outside_s
    p50, p99 = np.percentile(loop.plan_s, [50, 99]) * 1e3
    return Speed(float(p50), float(p99), plans / sum(loop.plan_s), plans / cycles_s)


class _Loop:
    """Requests one after the other; the oldest of the open ones ends as a new one comes."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._now = 0.0
        self._nodes = len(cluster.engines)
        self.open_max = OPEN_PLANS_A_NODE * self._nodes
        self._open: deque[Plan] = deque()
        self._reports_due = 0.0
        self._next_report = 0
        self.plan_s: list[float] = []

    def one(self, keys: list[BlockKey]) -> None:
        cluster, scheduler = self._cluster, self._cluster.scheduler
        self._now += 1 / CLOCK_PLANS_PER_S
        request = cluster.request("r", keys, PROMPT_TOKENS, NEW_TOKENS)
        begun_s = time.thread_time()
        plan = scheduler.plan(request, self._now)
        self.plan_s.append(time.thread_time() - begun_s)
        for agent, share in plan.shares().items():
            scheduler.share_settled(plan.plan, agent, [True] * len(share), self._now)
        scheduler.submitted(plan.plan, self._now)
        self._open.append(plan)
        if len(self._open) > self.open_max:
            scheduler.finished(self._open.popleft().plan, self._now)
        self._report()

    def _report(self) -> None:
        """Every node's two processes report once a period, one node after the other."""
        self._reports_due += self._nodes / REPORT_PERIOD_S / CLOCK_PLANS_PER_S
        while self._reports_due >= 1:
            self._reports_due -= 1
            row = self._next_report = (self._next_report + 1) % self._nodes
            self._cluster.report_engine(row, self._now, OPEN_PLANS_A_NODE)
            self._cluster.report_agent(row, self._now)


def policy_alone(prefill: int, decode: int, plans: int) -> Speed:
    """n-way over a cluster of this size, every block remote, no look-up."""
    cluster = Cluster("n-way", prefill, decode)
    cluster.scheduler.directory = RemoteStore()
    keys = some_keys(HIT_BLOCKS)
    return measure(cluster, iter(lambda: keys, None), plans)


def with_directory(
    prefill: int, decode: int, plans: int, blocks: int, progress: Callable[[float], None]
) -> tuple[Speed, float]:
    """The same, every request with a look-up of its own keys; and bytes a block of memory."""
    cluster = Cluster("n-way", prefill, decode)
    prompts = -(-blocks // HIT_BLOCKS)
    directory = cluster.scheduler.directory
    for prompt in range(prompts):
        agent = cluster.agents[prompt % len(cluster.agents)]
        changes = [_Held(key, TierName.REMOTE) for key in _prompt_keys(prompt)]
        sequence = prompt // len(cluster.agents)
        directory.apply(agent, 1, sequence, sequence == 0, changes)
        progress(prompt / prompts)
    order = np.random.default_rng(1).permutation(prompts).tolist()
    speed = measure(cluster, map(_prompt_keys, order), plans)
    return speed, directory.memory_bytes / len(directory)


class _Held(msgspec.Struct, frozen=True):
    key: BlockKey
    tier: TierName
    held: bool = True


def _prompt_keys(prompt: int) -> list[BlockKey]:
    """A prompt's keys, the same again whenever asked, so that they need not be kept."""
    raw = np.random.default_rng(prompt).bytes(HIT_BLOCKS * KEY_BYTES)
    return [BlockKey(raw[at : at + KEY_BYTES]) for at in range(0, len(raw), KEY_BYTES)]
