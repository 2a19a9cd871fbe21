"""One campaign: a cluster, clients, and a schedule of faults carried out on them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.clients.load import RIGHT, SALTS, TIE, Answer, Load, Weights
from benchmarks.clients.reference import Conversation
from benchmarks.faults import resources
from benchmarks.faults.acts import Scene, perform
from benchmarks.faults.cluster import Cluster
from benchmarks.faults.schedule import BYTE_KINDS, Fault
from benchmarks.faults.stage import POOL_TOKENS, PORT, Stage
from benchmarks.faults.verdict import FAILED, Done, Records
from benchmarks.faults.watch import Watch
from benchmarks.own_cluster import ClusterFailed
from launch.cluster.layout import PAGE_TOKENS

URL = f"http://127.0.0.1:{PORT}"
WARM_SALT = "warm"
HEAL_TIMEOUT_S = 240.0
STORED_TIMEOUT_S = 60.0
LAST_LOOK_S = 2.0
HELD_TIMEOUT_S = 45.0
"""A decode engine keeps the pages of a request whose prefill engine died for 30 s from the abort
on: writes that were under way may still arrive (docs/limits.md)."""
ACT_TIMEOUT_S = 240.0


class Campaign:
    """``run`` once. ``records`` has what was seen, also after a failure."""

    def __init__(
        self,
        schedule: Sequence[Fault],
        conversations: Sequence[Conversation],
        models: dict[str, Path],
        note: Callable[[str, Any], None],
        advance: Callable[[float], None],
    ) -> None:
        """``note``: a line of the event log; ``advance``: seconds of the schedule that passed."""
        self.records = Records(engine_wait_s=0.0, engines=[])
        self._schedule = schedule
        self._conversations = conversations
        self._models = models
        self._note = note
        self._advance = advance
        self._weights = Weights()
        self._broken: set[str] = set()

    async def run(self, stage: Stage, logs: Path, minutes: float, seed: int) -> None:
        """Raises :class:`ClusterFailed` when the cluster does not start, or does not heal."""
        cluster = Cluster(stage.records(logs), URL, logs)
        self.records.engines = cluster.names("engine")
        self.records.engine_wait_s = stage.engine_wait_s
        load = Load([URL], self._conversations, self._weights, self._answered)
        watch = Watch(cluster)
        try:
            cluster.start()
            await cluster.wait_whole()
            await self._warm(load)
            # As much as is asked at the end: connections are made when they are first needed.
            await cluster.operator.order("/flush_cache", {})
            await load.ask_all([WARM_SALT] * SALTS)
            self.records.first = await self._held(cluster)
            async with _running(watch.run()):
                await self._under_faults(cluster, stage, load, (minutes, seed))
                await self._heal(cluster)
                self.records.events = cluster.events()
                self.records.left = await self._held(cluster)
                await self._restart_all(cluster)
                await self._warm(load)
                self.records.last_answers = await load.ask_all(load.salts)
                self.records.last = await self._held(cluster)
                await asyncio.sleep(LAST_LOOK_S)
                self.records.missing = watch.missing_since(self.records.counted_from_s)
        finally:
            self.records.looks = watch.looks
            self.records.events = self.records.events or cluster.events()
            await cluster.close()

    # ---- the phases ---------------------------------------------------------------------

    async def _warm(self, load: Load) -> None:
        """The same requests at the start and at the end."""
        answers = await load.ask_all([WARM_SALT])
        wrong = [a for a in answers if a.outcome not in (RIGHT, TIE)]
        if wrong:
            raise ClusterFailed(f"without a fault: {wrong[0].outcome} {wrong[0].says}")

    async def _under_faults(
        self, cluster: Cluster, stage: Stage, load: Load, lasts: tuple[float, int]
    ) -> None:
        minutes, seed = lasts
        load.answers.clear()
        scene = Scene(cluster, stage, URL, self._weights, self._models)
        begun_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run(seed))
            for fault in self._schedule:
                group.create_task(self._act(scene, fault, begun_s + fault.at_s))
            while (left_s := begun_s + minutes * 60 - time.monotonic()) > 0:
                await asyncio.sleep(min(1.0, left_s))
                self._advance(min(1.0, left_s))
            load.stop()
        self.records.answers = list(load.answers)

    async def _act(self, scene: Scene, fault: Fault, at_s: float) -> None:
        """Do it at its time, unless what it is to be done to is broken already."""
        await asyncio.sleep(at_s - time.monotonic())
        place = fault.target.partition("/")[0]
        if place in self._broken:
            self._note("skipped", fault)
            return
        self._note("begins", fault)
        begun_s = time.monotonic()
        self._broken.add(place)
        try:
            async with asyncio.timeout(ACT_TIMEOUT_S):
                said = await perform(scene, fault)
        except (ClusterFailed, TimeoutError, OSError, RuntimeError) as error:
            said = f"{FAILED}{error!r}"
        finally:
            self._broken.discard(place)
        done = Done(fault.kind, fault.target, begun_s, time.monotonic(), said)
        self.records.faults.append(done)
        if fault.kind in BYTE_KINDS:
            self.records.counted_from_s = max(self.records.counted_from_s, done.ended_s)
        self._note("ended", done)

    async def _heal(self, cluster: Cluster) -> None:
        """Until all is there again, and stored."""
        await cluster.wait_whole(HEAL_TIMEOUT_S, time.monotonic())
        deadline = time.monotonic() + STORED_TIMEOUT_S
        busy = ("engine_open_jobs{", "agent_persisting_blocks{", "requests_in_flight")
        while sum(
            v
            for name, v in (await cluster.operator.metrics()).items()
            if any(b in name for b in busy)
        ):
            if time.monotonic() > deadline:
                self._note("not stored", f"after {STORED_TIMEOUT_S:g} s")
                return
            await asyncio.sleep(0.5)

    async def _restart_all(self, cluster: Cluster) -> None:
        begun_s = time.monotonic()
        for name in (*cluster.names("agent"), *cluster.names("engine"), "gateway"):
            cluster.signal(name, signal.SIGKILL)
        await asyncio.sleep(1.0)
        await cluster.wait_whole(since_s=begun_s)

    async def _held(self, cluster: Cluster) -> resources.Holdings:
        """Once the engines' caches are empty, that has been reported, and nothing is held; or what
        is held for longer than it may be."""
        give_up_at = time.monotonic() + HELD_TIMEOUT_S
        while True:
            await cluster.operator.order("/flush_cache", {})
            await asyncio.sleep(LAST_LOOK_S)
            held = await resources.look(cluster, POOL_TOKENS, PAGE_TOKENS)
            if not (held.pages_taken or held.slots_taken) or time.monotonic() > give_up_at:
                return held
            self._note("held", {"pages": held.pages_taken, "slots": held.slots_taken})

    def _answered(self, answer: Answer) -> None:
        if answer.outcome not in (RIGHT, TIE):
            self._note("answer", answer)


@contextlib.asynccontextmanager
async def _running(work: Any) -> Any:
    """A task beside what is in the block."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


def as_line(what: str, value: Any, time_s: float) -> bytes:
    """Of the event log."""
    fields = {"time_s": round(time_s, 3), "what": what, "of": msgspec.to_builtins(value)}
    return msgspec.json.encode(fields) + b"\n"
