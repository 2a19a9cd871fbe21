"""The cluster of one family: one prefill and one decode engine, their agents and stores."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import msgspec
import psutil

from benchmarks.clients.operator import Operator
from benchmarks.clients.reference import sampling
from benchmarks.models.families import Family
from benchmarks.own_cluster import ClusterFailed, own_cluster
from launch.gateway.request.trace import HEADER

START_TIMEOUT_S = 600.0
WAIT_TIMEOUT_S = 240.0
ANSWER_TIMEOUT_S = 300.0
LOOK_S = 0.1
PROCESSES = 4
"""Engines and agents."""
REGISTER_S = 2.0
"""Until engines have registered with agents that were started again."""
PREFILL_CHUNK_TOKENS = 512
POOL_TOKENS = 20480
DRAM_BYTES = "512MiB"
CRASH_VARIABLE = "DUALPATH_BENCHMARK_CRASH"
_Given = TypeVar("_Given")
_CRASH_CODE = Path(__file__).with_name("crash")


class Answer(msgspec.Struct):
    """Of SGLang, plain or behind the gateway."""

    tokens: list[int]
    cached_tokens: int = 0
    verifies: int = 0
    """How often the model checked a draft's tokens; 0 without a draft."""
    trace: dict[str, Any] = {}
    margins: list[float] = []
    """By how much each token was likelier than the next best one (logarithms), if asked for."""

    @property
    def read_bytes(self) -> int:
        """From SSDs and the remote store."""
        readers = self.trace.get("readers", {}).values()
        return sum(sum(reader["read_bytes"].values()) for reader in readers)


async def ask(
    http: aiohttp.ClientSession,
    url: str,
    prompt: list[int],
    new_tokens: int,
    margins: bool = False,
) -> Answer:
    """Greedy tokens; raises :class:`ClusterFailed`."""
    body: dict[str, Any] = {"input_ids": prompt, "sampling_params": sampling(new_tokens)}
    if margins:
        body |= {"return_logprob": True, "top_logprobs_num": 2}
    try:
        async with http.post(f"{url}/generate", json=body) as response:
            status, text = response.status, await response.read()
            header = response.headers.get(HEADER, "{}")
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ClusterFailed(f"{url}: {error!r}") from error
    if status != 200:
        raise ClusterFailed(f"{url}: {status} {text[:300].decode(errors='replace')}")
    value = msgspec.json.decode(text)
    meta = value["meta_info"]
    return Answer(
        value["output_ids"],
        meta["cached_tokens"],
        meta.get("spec_verify_ct", 0),
        msgspec.json.decode(header),
        [best[0] - next_[0] for best, next_ in meta.get("output_top_logprobs") or []],
    )


def session() -> aiohttp.ClientSession:
    """A connection a request: one that is kept may just be closed by the server."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(force_close=True),
        timeout=aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S),
    )


class Cluster:
    """Handle of a running one."""

    def __init__(self, url: str, folder: Path, http: aiohttp.ClientSession) -> None:
        self.url = url
        self.operator = Operator(url)
        self.remote = folder / "remote"
        self.crash_file = folder / "crash"
        self._ssd = folder / "ssd"
        self._http = http

    async def ask(self, prompt: list[int], new_tokens: int) -> Answer:
        return await ask(self._http, self.url, prompt, new_tokens)

    async def wait_whole(self) -> None:
        async def whole() -> bool:
            return len(await self.operator.heard()) == PROCESSES

        await self._wait(whole, "all agents and engines")

    async def set_policy(self, name: str) -> None:
        await self._order("/admin/policy", {"path_policy": name})

    async def flush(self) -> None:
        """The engines' own caches, whose memory is poisoned."""
        await self._order("/flush_cache", {})

    async def _order(self, path: str, body: dict[str, Any]) -> None:
        """Until it is done: an engine may be busy, or an agent just starting."""
        deadline = time.monotonic() + WAIT_TIMEOUT_S
        while not (said := await self.operator.order(path, body)).startswith("200"):
            if time.monotonic() > deadline:
                raise ClusterFailed(f"{path}: {said}")
            await asyncio.sleep(LOOK_S)

    async def kill_agents(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """kill -9 of both, until they are back: their DRAM is empty then. ``meanwhile`` is done
        while none of them runs."""
        before, pids = await self.agents(), _agents_pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        meanwhile()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        await self.wait_restarted(before, len(before))

    def clear_ssd(self) -> None:
        for folder in filter(Path.is_dir, list(self._ssd.iterdir())):
            shutil.rmtree(folder)

    async def wait_restarted(self, before: dict[str, int], count: int) -> None:
        """Until so many of the agents that had these incarnations are there anew."""

        async def back() -> bool:
            now = await self.agents()
            return sum(now.get(name, 0) > number for name, number in before.items()) >= count

        await self._wait(back, "agents started again")
        await asyncio.sleep(REGISTER_S)

    async def agents(self) -> dict[str, int]:
        """Incarnation of each living one."""
        state = await self.operator.state() or {"agents": []}
        return {a["name"]: a["incarnation"] for a in state["agents"] if a["alive"]}

    async def wait_stored(self) -> None:
        """Until all that engines offered is held and durable, and the directory knows it."""
        await asyncio.sleep(LOOK_S)  # the end of a request is offered after its answer has left
        for metric in ("engine_open_jobs", "agent_persisting_blocks"):
            await self._wait(partial(self._none_since, metric, time.monotonic()), f"no {metric}")
        await asyncio.sleep(LOOK_S)

    async def _none_since(self, metric: str, begun_s: float) -> bool:
        """Whether all processes have reported since, and none of it is left."""
        if await self.operator.heard(begun_s) != await self.operator.heard():
            return False
        metrics = await self.operator.metrics()
        return bool(metrics) and not any(n for name, n in metrics.items() if metric in name)

    async def _wait(self, holds: Callable[[], Awaitable[bool]], what: str) -> None:
        deadline = time.monotonic() + WAIT_TIMEOUT_S
        while not await holds():
            if time.monotonic() > deadline:
                raise ClusterFailed(f"{what}: not within {WAIT_TIMEOUT_S:g} s")
            await asyncio.sleep(LOOK_S)


@contextlib.asynccontextmanager
async def running(family: Family, folder: Path) -> AsyncIterator[Cluster]:
    """All of it is known to the gateway; raises :class:`ClusterFailed`."""
    folder.mkdir()
    crash = {CRASH_VARIABLE: str(folder / "crash"), "PYTHONPATH": _with_crash_code()}
    start = own_cluster("prefill", flags(family, folder), START_TIMEOUT_S, crash)
    async with beside(start) as url, session() as http:
        cluster = Cluster(url, folder, http)
        try:
            await cluster.wait_whole()
            yield cluster
        finally:
            await cluster.operator.close()


@contextlib.asynccontextmanager
async def beside(manager: AbstractContextManager[_Given]) -> AsyncIterator[_Given]:
    """It starts and ends in a thread."""
    given = await asyncio.to_thread(manager.__enter__)
    try:
        yield given
    finally:
        await asyncio.to_thread(manager.__exit__, None, None, None)


def _with_crash_code() -> str:
    return os.pathsep.join([str(_CRASH_CODE), *filter(None, [os.environ.get("PYTHONPATH")])])


def flags(family: Family, folder: Path) -> list[str]:
    """Of ``launch.cluster``, beside those of every benchmark's."""
    prefill = (*family.prefill, "--chunked-prefill-size", str(PREFILL_CHUNK_TOKENS))
    found = ["--model", family.model, "--poison-kv", "--restart-backoff-max-s", "1"]
    found += ["--ssd-dir", str(folder / "ssd"), "--remote", (folder / "remote").as_uri()]
    found += ["--dram-bytes", DRAM_BYTES, "--ssd-bytes", "2GiB", "--promotion-policy", "never"]
    found += ["--max-total-tokens", str(POOL_TOKENS), "--log-dir", str(folder / "logs")]
    for name, given in (
        ("engine", family.engines),
        ("prefill", prefill),
        ("decode", family.decode),
    ):
        found += [f"--{name}-args", " ".join(given)] if given else []
    return found


def _agents_pids() -> list[int]:
    """Of this process's cluster."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "DUALPATH_AGENT" in child.environ():
                found.append(child.pid)
    return found
