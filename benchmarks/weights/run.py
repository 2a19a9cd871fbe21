"""The servers and the updates of one run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.clients.operator import Operator
from benchmarks.clients.reference import make_other_weights
from benchmarks.models.cluster import beside, session
from benchmarks.own_cluster import ClusterFailed, free_port, own_cluster, pids_of
from benchmarks.plain_sglang import plain_sglang
from benchmarks.weights.cases import DISTRIBUTED, IN_PLACE, Case
from benchmarks.weights.judge import Judge
from benchmarks.weights.load import CLIENTS, Clients
from benchmarks.weights.updates import Trainer
from benchmarks.weights.verdict import ENGINES, Records, Seen
from launch.models.resolve import resolve_model

START_TIMEOUT_S = 240.0
BACK_TIMEOUT_S = 120.0
LOOK_S = 0.1
DECODING = 2
"""Requests that have tokens already when an update begins."""
ANSWERS = 2 * CLIENTS
"""To requests that were sent after its end."""
PORTS_APART = 640
FLAGS = [
    *("--prefill", "2", "--decode", "2", "--poison-kv", "--restart-backoff-max-s", "1"),
    *("--max-total-tokens", "16384", "--ssd-bytes", "1GiB"),
]
Folders = Mapping[bool, Path]
"""Of weights, by whether they are the changed ones."""
Say = Callable[[str], None]


async def measure(
    cases: Sequence[Case], seed: int, folder: Path, records: Records, say: Say
) -> None:
    """Fills ``records``; raises :class:`ClusterFailed`. What is right is asked at the end, so that
    nothing else runs beside what is timed."""
    model = resolve_model("tiny")
    folders = {False: model, True: make_other_weights(model, folder / "changed")}
    say("one server of plain SGLang ...")
    async with _plain(folders[False], free_port(), folder / "plain.log") as url:
        async with session() as http:
            trainer = Trainer(http, url, folders, ranks=1)
            plain_cases = list(dict.fromkeys(case.plain for case in cases))
            await Scene(trainer, Clients(http, url, seed), say).run(plain_cases, records.plain)
    say("the cluster ...")
    async with beside(own_cluster("n-way", FLAGS, START_TIMEOUT_S)) as url, session() as http:
        operator = Operator(url)
        try:
            trainer = Trainer(http, url, folders, ranks=ENGINES)
            scene = Scene(trainer, Clients(http, url, seed), say, operator)
            await scene.wait_whole()
            await scene.run(cases, records.cluster)
        finally:
            await operator.close()
    say("what plain SGLang gives ...")
    port = free_port()
    async with contextlib.AsyncExitStack() as stack:
        urls = {}
        for changed, model in folders.items():
            log = folder / f"right-{changed}.log"
            server = _plain(model, port + PORTS_APART * changed, log)
            urls[changed] = await stack.enter_async_context(server)
        judge = Judge(await stack.enter_async_context(session()), urls)
        for seen in records.cluster:
            seen.judged = await judge.judge(seen.case, seen.update, seen.pieces)


@contextlib.asynccontextmanager
async def _plain(model: Path, port: int, log: Path) -> AsyncIterator[str]:
    """Its URL, once it serves."""
    async with beside(plain_sglang(model, port, log)) as wait_served:
        yield await asyncio.to_thread(wait_served)


class Scene:
    """One server or cluster, its trainer and its clients."""

    def __init__(
        self, trainer: Trainer, clients: Clients, say: Say, operator: Operator | None = None
    ) -> None:
        """``operator``: of a cluster."""
        self._trainer, self._clients = trainer, clients
        self._say, self._operator = say, operator

    async def run(self, cases: Sequence[Case], found: list[Seen]) -> None:
        in_group = False
        for case in cases:
            self._say(case.name)
            if in_group != (case.way == DISTRIBUTED):
                await (self._trainer.leave_group() if in_group else self._join_group())
                in_group = not in_group
            found.append(await self._update(case))
            if self._operator is not None and case.killed:
                await self.wait_whole()
        if in_group:
            await self._trainer.leave_group()

    async def _join_group(self) -> None:
        await self._trainer.join_group(free_port() + PORTS_APART)

    async def _update(self, case: Case) -> Seen:
        clients = self._clients
        before = len(clients.pieces)
        clients.start()
        await clients.wait_decoding(DECODING)
        clients.apart = f" {time.monotonic()}" if case.mode == IN_PLACE else ""
        update = await self._trainer.update(case, lambda: _kill(case.killed))
        await clients.wait_answers(ANSWERS, update.committed_s)
        await clients.stop()
        clients.apart = ""
        if case.mode == IN_PLACE:  # what came of old KV is not to be asked for from here on
            await self._trainer.flush()
        return Seen(case, update, clients.pieces[before:])

    async def wait_whole(self) -> None:
        """Until the gateway has heard from all engines and their agents."""
        assert self._operator is not None
        deadline = time.monotonic() + BACK_TIMEOUT_S
        while len(await self._operator.heard()) < 2 * ENGINES:
            if time.monotonic() > deadline:
                raise ClusterFailed(f"only {await self._operator.heard()} after a kill")
            await asyncio.sleep(LOOK_S)


def _kill(name: str) -> None:
    """kill -9 of all processes of an engine."""
    for pid in pids_of(name) if name else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
