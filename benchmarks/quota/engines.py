"""Real engines: two prefill engines that pack to the quota, two with fixed-size chunks, and one
decode engine that all send to. No agents and no gateway: prompts are sent to pairs of engines
straight, and a cached prefix is in the prefill engine's own radix tree."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil

from benchmarks.own_cluster import ClusterFailed
from benchmarks.supervised import Supervised
from engine.config import EngineConfig
from launch.cluster.config import ClusterConfig
from launch.cluster.hardware import Hardware
from launch.cluster.process_record import HealthCheck, ProcessRecord
from launch.cluster.processes import process_records
from launch.models.resolve import resolve_model
from scheduler.quota import Chunk

RANKS = 2
POOL_TOKENS = 131_072
START_TIMEOUT_S = 400.0
REQUEST_TIMEOUT_S = 300.0
PORTS_OF_AN_ARM = 320
NEVER_MS = 1e9
"""A quota that no batch reaches: SGLang's own packing, with the same log lines."""
TOKENS = range(300, 2000)
"""Ordinary words of the model's vocabulary."""

_LINE = re.compile(
    r"prefill batch requests=(\d+) new_tokens=(\d+) context_tokens=(\d+) quota_s=\S+ full=(\d) "
    r"estimated_s=(\S+) attention_s=(\S+) forward_s=(\S+)"
)


class Batch(msgspec.Struct, frozen=True):
    """What an engine's log says of one prefill batch."""

    requests: int
    new_tokens: int
    context_tokens: int
    full: bool
    """More was waiting than the quota, or the chunk size, let join."""
    estimated_s: float
    attention_s: float
    """CPU time of the scheduler's thread in attention."""
    forward_s: float
    """By the clock."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """A process and where it is reached."""

    record: ProcessRecord
    log: Path

    @property
    def url(self) -> str:
        return f"http://{self.record.host}:{self.record.ports['http']}"

    def cpu_s(self) -> float:
        """Of its scheduler process, so far."""
        port = str(self.record.ports["http"])
        for process in psutil.process_iter(["cmdline"]):
            if port in (process.info["cmdline"] or ()):
                children = process.children(recursive=True)
                return max(sum(child.cpu_times()[:2]) for child in children)
        raise ClusterFailed(f"{self.record.name} does not run")


@dataclasses.dataclass(frozen=True)
class Group:
    """Prefill engines that pack in one way, as the ranks of a group."""

    name: str
    engines: list[Engine]
    chunk_tokens: int


def groups(
    port: int, folder: Path, quota_ms: float, fixed_tokens: int, tokens_max: int
) -> tuple[list[Group], Engine]:
    """The two groups, and the decode engine."""
    arms = {"quota": (quota_ms, tokens_max), "fixed": (NEVER_MS, fixed_tokens)}
    found, decode = [], None
    for number, (name, (milliseconds, chunk_tokens)) in enumerate(arms.items()):
        config = ClusterConfig(
            model="tiny",
            prefill=RANKS,
            port=port,
            base_port=port + 1 + number * PORTS_OF_AN_ARM,
            device="cpu",
            transfer="tcp",
            max_total_tokens=POOL_TOKENS,
            prefill_quota_ms=milliseconds,
            prefill_args=("--chunked-prefill-size", str(chunk_tokens), "--log-level", "info"),
        )
        records = process_records(
            config, resolve_model("tiny"), Hardware("cpu", "tcp", "the benchmark has no other")
        )
        engines = {record.name: record for record in records if record.kind == "engine"}
        ranks = [_alone(engines[f"p{rank}"], f"{name}-{rank}") for rank in range(RANKS)]
        found.append(
            Group(name, [Engine(r, folder / f"{r.name}.log") for r in ranks], chunk_tokens)
        )
        decode = decode or _alone(engines["d0"], "decode")
    assert decode is not None
    return found, Engine(decode, folder / "decode.log")


def _alone(record: ProcessRecord, name: str) -> ProcessRecord:
    """The engine without agents; the decode engine is SGLang's own."""
    env, ready = dict(record.env), record.ready[0]
    if "bootstrap" in record.ports:
        settings = EngineConfig.from_env(env)
        env |= msgspec.structs.replace(settings, name=name, agents={}).to_env()
    else:
        del env[EngineConfig.VARIABLE]
    alive = HealthCheck("http", ready.target)
    return dataclasses.replace(record, name=name, env=env, ready=(ready,), alive=alive)


class Client:
    """Sends prompts of given lengths, and reads what the engines' logs say of the batches."""

    def __init__(self, http: aiohttp.ClientSession, decode: Engine, supervised: Supervised) -> None:
        self._http, self._decode, self._supervised = http, decode, supervised
        self._random = random.Random(1)
        self._prefix: list[int] = []
        self._read: dict[Path, int] = {}

    async def warm(self, group: Group, prefix_tokens: int) -> None:
        """Make a common prefix cached in every engine of the group: each prompt begins with as
        much of it as it is to find cached."""
        if not self._prefix:
            self._prefix = self._random.choices(TOKENS, k=prefix_tokens)
        prompts = [Chunk(prefix_tokens, 1)]
        await asyncio.gather(*(self._serve(engine, prompts) for engine in group.engines))
        self.batches(group)

    async def run(self, group: Group, prompts: Sequence[Sequence[Chunk]]) -> None:
        """Each engine's prompts, all at once; returns when every one is answered."""
        pairs = zip(group.engines, prompts, strict=True)
        await asyncio.gather(*(self._serve(engine, of_rank) for engine, of_rank in pairs))

    def batches(self, group: Group) -> list[list[Batch]]:
        """Of each engine, since the last call."""
        return [self._batches(engine.log, group.chunk_tokens) for engine in group.engines]

    def _batches(self, log: Path, chunk_tokens: int) -> list[Batch]:
        with log.open("rb") as file:
            file.seek(self._read.get(log, 0))
            text = file.read()
        self._read[log] = self._read.get(log, 0) + len(text)
        return [_batch(fields, chunk_tokens) for fields in _LINE.findall(text.decode())]

    async def _serve(self, engine: Engine, prompts: Sequence[Chunk]) -> None:
        await asyncio.gather(*(self._generate(engine, chunk) for chunk in prompts))

    async def _generate(self, engine: Engine, chunk: Chunk) -> None:
        own = self._random.choices(TOKENS, k=chunk.new_tokens)
        body = {
            "input_ids": self._prefix[: chunk.context_tokens] + own,
            "sampling_params": {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True},
            "bootstrap_host": engine.record.host,
            "bootstrap_port": engine.record.ports["bootstrap"],
            "bootstrap_room": self._random.randrange(1 << 62),
        }
        await asyncio.gather(*(self._post(url, body) for url in (engine.url, self._decode.url)))

    async def _post(self, url: str, body: dict[str, Any]) -> None:
        async with self._http.post(f"{url}/generate", json=body) as response:
            text = await response.text()
        if response.status != 200 or self._supervised.deaths:
            raise ClusterFailed(f"HTTP {response.status}: {text[:300]} {self._supervised.deaths}")


def _batch(fields: Sequence[str], chunk_tokens: int) -> Batch:
    requests, new, context = map(int, fields[:3])
    full = fields[3] == "1" or new > chunk_tokens - 2 * 64
    return Batch(requests, new, context, full, *map(float, fields[4:]))
