"""One run: a cluster, clients, and steps carried out on it one after another."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence

from benchmarks.clients.load import RIGHT, TIE, Answer, Load, Weights
from benchmarks.clients.reference import Conversation
from benchmarks.elastic.cluster import URLS, Cluster
from benchmarks.elastic.hosts import GATEWAYS
from benchmarks.elastic.steps import AT_FIRST, DRAIN, END, GATEWAY, JOIN, KILL, NODES, Step
from benchmarks.elastic.verdict import Done, Records, after_start_up_s, first_share_s
from benchmarks.own_cluster import ClusterFailed

SALTS = 6
"""Under which each conversation is held: with the default number of them more than all DRAM and
SSDs hold together."""
CALM_S = 3.0
"""Between two steps."""
SHARE_TIMEOUT_S = 60.0
"""That long is reported where there is none."""
WHOLE_TIMEOUT_S = 240.0
LOOK_S = 0.1


class Campaign:
    """``run`` once. ``records`` has what was seen, also after a failure."""

    def __init__(self, conversations: Sequence[Conversation], say: Callable[[str], None]) -> None:
        self.records = Records()
        self._active, self._standby = GATEWAYS
        self._say = say
        self._load = Load(URLS, conversations, Weights(), self._answered, SALTS)
        self.records.answers = self._load.answers

    async def run(self, cluster: Cluster, steps: Sequence[Step], seed: int) -> None:
        """Raises :class:`ClusterFailed` when the cluster does not start."""
        self._cluster = cluster
        try:
            await self._begin()
            await self._store_all()
            async with self._under_load(seed):
                for number, step in enumerate(steps, 1):
                    await asyncio.sleep(CALM_S)
                    await self._perform(step, f"{number}/{len(steps)}")
                await asyncio.sleep(CALM_S)
            await self._end()
        finally:
            await self._cluster.close()

    # ---- the phases ---------------------------------------------------------------------

    async def _begin(self) -> None:
        """Nodes wait for the gateway."""
        for name in AT_FIRST:
            self._cluster.start_node(name)
        self._cluster.start_gateway(self._active)
        for name in AT_FIRST:
            await self._cluster.serves(name)
        await self._wait_healthy()
        await self._start_standby()
        self._say(f"{', '.join(AT_FIRST)} serve")

    async def _store_all(self) -> None:
        """All that will be asked, so that there is something to read from the beginning on."""
        await asyncio.gather(*(self._load.ask_all([salt]) for salt in self._load.salts))
        self._say(f"{len(self._load.answers)} prompts are stored")

    @contextlib.asynccontextmanager
    async def _under_load(self, seed: int) -> AsyncIterator[None]:
        load = asyncio.create_task(self._load.run(seed))
        try:
            yield
        finally:
            self._load.stop()
            await load

    async def _end(self) -> None:
        """Every node leaves, then the gateways."""
        for name in (*self._cluster.nodes, self._standby, self._active):
            ending = Done(Step(END, name), time.monotonic())
            try:
                self._cluster.signal(name, signal.SIGTERM)
                await self._cluster.ended(name)
            except ClusterFailed as error:
                ending.failure = str(error)
                self.records.done.append(ending)
        for name in (*NODES, *GATEWAYS):
            left = await asyncio.to_thread(self._cluster.hosts[name].left)
            self.records.left_at_the_end.append(left)

    # ---- the steps ----------------------------------------------------------------------

    async def _perform(self, step: Step, which: str) -> None:
        acts = {JOIN: self._join, DRAIN: self._drain, KILL: self._kill, GATEWAY: self._gateway}
        done = Done(step, time.monotonic())
        self.records.done.append(done)
        try:
            await acts[step.kind](done)
        except (ClusterFailed, TimeoutError, OSError) as error:
            done.failure = f"{type(error).__name__}: {error}"
        done.ended_s = done.ended_s or time.monotonic()
        took_s = done.ended_s - done.begun_s
        what = f"{step.kind} {step.node} {step.clock_s or ''}".rstrip()
        self._say(f"{which} {what}: {took_s:.1f} s {self._outcome(done)}")

    def _outcome(self, done: Done) -> str:
        if done.failure:
            return done.failure
        if (share_after_s := after_start_up_s(done)) is not None:
            return f"and work {share_after_s:.1f} s later"
        return f"left: {done.left}" if done.left is not None else ""

    async def _join(self, done: Done) -> None:
        node = done.step.node
        self._cluster.start_node(node, done.step.clock_s)
        done.ended_s = await self._cluster.serves(node)
        give_up_at = done.ended_s + SHARE_TIMEOUT_S
        while done.share_s is None and time.monotonic() < give_up_at:
            await asyncio.sleep(LOOK_S)
            done.share_s = first_share_s(self._load.answers, node, done.begun_s)
        done.share_s = done.share_s or give_up_at

    async def _drain(self, done: Done) -> None:
        node = done.step.node
        log = self._cluster.running[node].log
        self._cluster.signal(node, signal.SIGTERM)
        status, done.ended_s = await self._cluster.ended(node)
        done.left = await asyncio.to_thread(self._cluster.hosts[node].left)
        if status or "not drained in time" in log.read_text(errors="replace"):
            raise ClusterFailed(f"{node} ended with status {status}, see {log.name}")

    async def _kill(self, done: Done) -> None:
        """``launch.node`` alone, with which all that it has started dies."""
        node = done.step.node
        self._cluster.signal(node, signal.SIGKILL)
        _, done.ended_s = await self._cluster.ended(node)
        done.left = await asyncio.to_thread(self._cluster.hosts[node].left)

    async def _gateway(self, done: Done) -> None:
        """The active one; it comes back as the standby."""
        self._cluster.signal(self._active, signal.SIGKILL)
        await self._cluster.ended(self._active)
        self._active, self._standby = self._standby, self._active
        await self._wait_healthy()
        done.ended_s = time.monotonic()
        await self._start_standby()

    # ---- waits --------------------------------------------------------------------------

    async def _wait_healthy(self) -> None:
        async with asyncio.timeout(WHOLE_TIMEOUT_S):
            while not await self._cluster.operators[self._active].healthy():
                await asyncio.sleep(LOOK_S)

    async def _start_standby(self) -> None:
        """Until it knows all that run, whose engines and agents tell it."""
        self._cluster.start_gateway(self._standby)
        nodes = self._cluster.nodes
        wanted = {f"agent-{name}" for name in nodes}
        wanted |= {name for name in nodes if NODES[name] != "reader"}
        async with asyncio.timeout(WHOLE_TIMEOUT_S):
            while not wanted <= await self._cluster.operators[self._standby].heard():
                await asyncio.sleep(LOOK_S)

    def _answered(self, answer: Answer) -> None:
        if answer.outcome not in (RIGHT, TIE):
            self._say(f"answer {answer.outcome} {answer.says[:160]}")
