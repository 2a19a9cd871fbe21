"""A fluid model of a cluster under the paper's workload, driven by the real scheduler.

What is modelled: every node's storage NIC as a queue of bytes, first come first served, at a
rate that may change; prefill engines as servers of tokens; decoding as a time a token. What
is not: the compute network (a delay here), DRAM, chunks of single blocks. The scheduler is the
one that serves, and it learns of the model what it learns of real agents: reports once a
second, with rates from the agents' own meter.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TypeVarTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.scheduler.cluster import PAGE_TOKENS, Cluster, Hardware, RemoteStore, some_keys
from common.block import BlockKey
from common.rate import RateMeter
from scheduler.options import SchedulerOptions
from scheduler.plan import NoEngine, Plan, PlanRequest

Ts = TypeVarTuple("Ts")

REPORT_PERIOD_S = 1.0
SAMPLE_PERIOD_S = 0.5


class Workload(msgspec.Struct, frozen=True):
    """Agents that take turns over a growing context, without a pause (DualPath, arXiv
    2602.21548, 64K traces: means of 429 tokens appended and 176 generated a turn). Lengths are
    uniform between half and one and a half times their mean."""

    load: float
    """What the agents would ask for if reads took no time, as a part of what all storage NICs
    can bring: it sets the number of agents."""
    turns: int | None = None
    """Of all agents together; None: for ever."""
    append_tokens: int = 429
    generated_tokens: int = 176
    context_max_tokens: int = 64 * 1024
    """Where a trajectory ends, and the agent's next one begins."""
    token_s: float = 0.02

    def agents(self, nodes: int, hardware: Hardware) -> int:
        hit_blocks = self.context_max_tokens / 2 / PAGE_TOKENS
        turn_s = self.generated_tokens * self.token_s
        reads_per_s = nodes * hardware.storage_bytes_per_s / (hit_blocks * hardware.block_bytes)
        return round(self.load * reads_per_s * turn_s)


class Clock:
    """Simulated time: calls to be made, in the order of their times."""

    def __init__(self) -> None:
        self.now = 0.0
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, delay_s: float, call: Callable[[*Ts], None], *arguments: *Ts) -> None:
        self._count += 1
        due: Callable[[], None] = partial(call, *arguments)
        heapq.heappush(self._calls, (self.now + delay_s, self._count, due))

    def run(self, until_s: float, done: Callable[[], bool] = lambda: False) -> None:
        while self._calls and self._calls[0][0] <= until_s and not done():
            self.now, _, call = heapq.heappop(self._calls)
            call()


class Nic:
    """One storage NIC. ``read_bytes``: all that it has brought."""

    def __init__(self, clock: Clock, bytes_per_s: float) -> None:
        self.meter = RateMeter()
        self.read_bytes = 0.0
        self.queue_bytes = 0.0
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._queue: deque[tuple[float, Callable[[], None]]] = deque()
        """What is left of the first read, and the whole of the others."""
        self._seen_s = 0.0
        self._timer = 0

    def read(self, size_bytes: float, done: Callable[[], None]) -> None:
        self.advance()
        self._queue.append((size_bytes, done))
        self.queue_bytes += size_bytes
        self.meter.note(self._clock.now, 0, True)
        if len(self._queue) == 1:
            self._set_timer()

    def set_rate(self, bytes_per_s: float) -> None:
        self.advance()
        self._bytes_per_s = bytes_per_s
        if self._queue:
            self._set_timer()

    def advance(self) -> None:
        """Count in what came since the last look."""
        span_s, self._seen_s = self._clock.now - self._seen_s, self._clock.now
        if not self._queue:
            return
        left, done = self._queue[0]
        came = min(left, span_s * self._bytes_per_s)
        self._queue[0] = left - came, done
        self.read_bytes += came
        self.queue_bytes -= came
        self.meter.note(self._clock.now, int(came), True)

    def _set_timer(self) -> None:
        self._timer += 1
        left_s = self._queue[0][0] / self._bytes_per_s
        self._clock.after(left_s, self._first_is_done, self._timer)

    def _first_is_done(self, timer: int) -> None:
        if timer != self._timer:
            return  # the rate has changed since
        self.advance()
        left, done = self._queue.popleft()
        self.read_bytes += left  # what rounding left over
        self.queue_bytes -= left
        if self._queue:
            self._set_timer()
        else:
            self.queue_bytes = 0.0
            self.meter.note(self._clock.now, 0, False)
        done()


class Turn(msgspec.Struct):
    """One request on its way."""

    agent: int
    appended: int
    generated: int
    request: PlanRequest
    unread: int = 0
    """Shares that have not been read yet."""


class Fluid:
    """A cluster of (prefill, decode) ``nodes`` and the agents that keep it busy."""

    def __init__(
        self,
        policy: str,
        nodes: tuple[int, int],
        workload: Workload,
        slowdown: dict[int, float] | None = None,
        pooled: bool = False,
        seed: int = 0,
    ) -> None:
        """``slowdown``: nodes whose storage NIC has this part of the usual rate. ``pooled``: one
        NIC with the rates of all reads everything: the ideal that no policy can beat."""
        self.clock = Clock()
        self.workload = workload
        self.cluster = Cluster(policy, *nodes, SchedulerOptions(load_policy="always"))
        self.cluster.scheduler.directory = RemoteStore()
        self.hardware = self.cluster.hardware
        self.nodes = sum(nodes)
        parts = [(slowdown or {}).get(node, 1.0) for node in range(self.nodes)]
        rates = [part * self.hardware.storage_bytes_per_s for part in parts]
        self.nics = [Nic(self.clock, rate) for rate in ([sum(rates)] if pooled else rates)]
        self.turns_done = 0
        self._turns_begun = 0
        self.samples_s: list[float] = []
        self.samples: list[list[float]] = []
        """Bytes that each NIC has brought, by time of ``samples_s``."""
        self.waiting: list[float] = []
        """Bytes in all read queues, likewise."""
        self._engine = {name: row for row, name in enumerate(self.cluster.engines)}
        of_node = self.nics * self.nodes if pooled else self.nics
        self._nic = dict(zip(self.cluster.agents, of_node, strict=True))
        self._free_s = [0.0] * self.nodes
        self._load = np.zeros((self.nodes, 3), np.int64)
        """Of each engine: sequences, pending tokens, context tokens."""
        self._queue: deque[Turn] = deque()
        """The global queue, first in first out."""
        self._rng = np.random.default_rng(seed)
        self._keys = some_keys(workload.context_max_tokens // PAGE_TOKENS + 1)
        self._start()

    def set_rate(self, node: int, part: float) -> None:
        """Of a node's storage NIC, as a part of the usual rate."""
        self.nics[node].set_rate(part * self.hardware.storage_bytes_per_s)

    def run(self, seconds: float) -> None:
        """Go on for so long."""
        self.clock.run(self.clock.now + seconds)

    def run_job(self, limit_s: float) -> float | None:
        """Until all turns are done; the time that it took, None beyond the limit."""
        self.clock.run(limit_s, lambda: self.turns_done == self.workload.turns)
        return self.clock.now if self.turns_done == self.workload.turns else None

    def read_bytes(self) -> NDArray[np.float64]:
        """What each NIC has brought until now."""
        for nic in self.nics:
            nic.advance()
        return np.array([nic.read_bytes for nic in self.nics])

    # ---- the agents --------------------------------------------------------------------

    def _start(self) -> None:
        """All at once, each somewhere in its trajectory."""
        agents = self.workload.agents(self.nodes, self.hardware)
        self._context = self._rng.integers(0, self.workload.context_max_tokens, agents).tolist()
        for agent in range(agents):
            self.clock.after(0.0, self._next_turn, agent)
        for node in range(self.nodes):
            self.clock.after(REPORT_PERIOD_S * node / self.nodes, self._report, node)
        self.clock.after(SAMPLE_PERIOD_S, self._sample)

    def _next_turn(self, agent: int) -> None:
        if self._turns_begun == self.workload.turns:
            return
        self._turns_begun += 1
        work = self.workload
        appended = self._about(work.append_tokens)
        generated = self._about(work.generated_tokens)
        if self._context[agent] + appended + generated > work.context_max_tokens:
            self._context[agent] = 0
        context = self._context[agent]
        keys = self._keys[: context // PAGE_TOKENS]
        request = self.cluster.request(str(agent), keys, context + appended, generated)
        self._queue.append(Turn(agent, appended, generated, request))
        self._plan_waiting()

    def _about(self, mean_tokens: int) -> int:
        return int(self._rng.integers(mean_tokens // 2, mean_tokens * 3 // 2))

    def _plan_waiting(self) -> None:
        while self._queue:
            try:
                plan = self.cluster.scheduler.plan(self._queue[0].request, self.clock.now)
            except NoEngine:
                return
            self._begin(self._queue.popleft(), plan)

    # ---- one turn ----------------------------------------------------------------------

    def _begin(self, turn: Turn, plan: Plan) -> None:
        shares = plan.shares()
        turn.unread = len(shares)
        for agent, keys in shares.items():
            size_bytes = float(len(keys) * self.hardware.block_bytes)
            self._nic[agent].read(size_bytes, partial(self._share_read, turn, plan, agent, keys))
        if not shares:
            self._submit(turn, plan)

    def _share_read(self, turn: Turn, plan: Plan, agent: str, keys: list[BlockKey]) -> None:
        in_dram = [True] * len(keys)
        self.cluster.scheduler.share_settled(plan.id, agent, in_dram, self.clock.now)
        turn.unread -= 1
        if not turn.unread:
            self._submit(turn, plan)

    def _submit(self, turn: Turn, plan: Plan) -> None:
        self.cluster.scheduler.submitted(plan.id, self.clock.now)
        prefill, decode = self._engine[plan.prefill], self._engine[plan.decode]
        miss = turn.request.prompt_tokens - len(plan.keys) * PAGE_TOKENS
        held = turn.request.prompt_tokens + turn.generated
        self._load[prefill] += (1, miss, turn.request.prompt_tokens)
        self._load[decode] += (1, 0, held)
        hit_bytes = len(plan.keys) * self.hardware.block_bytes
        delivered_s = self.clock.now + hit_bytes / self.hardware.compute_bytes_per_s
        begin_s = max(delivered_s, self._free_s[prefill])
        self._free_s[prefill] = begin_s + miss / self.hardware.prefill_tokens_per_s

        def prefilled() -> None:
            self._load[prefill] -= (1, miss, turn.request.prompt_tokens)
            self.clock.after(turn.generated * self.workload.token_s, decoded)

        def decoded() -> None:
            self._load[decode] -= (1, 0, held)
            self.cluster.scheduler.finished(plan.id, self.clock.now)
            self.turns_done += 1
            self._context[turn.agent] += turn.appended + turn.generated
            self._next_turn(turn.agent)
            self._plan_waiting()

        self.clock.after(self._free_s[prefill] - self.clock.now, prefilled)

    # ---- reports and records -----------------------------------------------------------

    def _report(self, node: int) -> None:
        nic = self._nic[self.cluster.agents[node]]
        nic.advance()
        self.cluster.report_engine(node, self.clock.now, *self._load[node].tolist())
        self.cluster.report_agent(node, self.clock.now, nic.queue_bytes, nic.meter.bytes_per_s)
        self.clock.after(REPORT_PERIOD_S, self._report, node)
        self._plan_waiting()

    def _sample(self) -> None:
        self.samples.append(self.read_bytes().tolist())
        self.samples_s.append(self.clock.now)
        self.waiting.append(sum(nic.queue_bytes for nic in self.nics))
        self.clock.after(SAMPLE_PERIOD_S, self._sample)
