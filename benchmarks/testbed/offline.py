"""The offline race: agents x turns, all at once, one arm after the other on a running cluster.

For each shape one cluster is started and stays; policies are switched live. A round is one job of
every arm, in an order that rotates, so that whatever changes on the machine meets all alike.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from fsspec import AbstractFileSystem

from benchmarks.radosgw import RadosGateway
from benchmarks.testbed import iperf, machine
from benchmarks.testbed.cluster import (
    Gateway,
    cluster_config,
    in_cluster,
    records_on,
    total,
)
from benchmarks.testbed.network import Network
from benchmarks.testbed.nic_use import observed
from benchmarks.testbed.oracle import ORACLE_CLASS
from benchmarks.testbed.results import BASIC, N_WAY, ORACLE, Run, Shape, ShapeResult
from benchmarks.testbed.workload import (
    AgentShape,
    Trajectories,
    deliver_once,
    run_job,
    store_contexts,
)

AGENTS_PER_PREFILL = 4
"""So many requests at once at each of Basic's storage NICs: it never idles between them."""
PORT = 20000
REMOTE_FOLDER = "kv"
LONG_HIT_TOKENS = 8192
LONG_HIT_PAIRS = 3
IPERF_S = 3
_READ_BYTES = "dualpath:agent_storage_read_bytes_total{"


class Plan(msgspec.Struct, frozen=True):
    """What to run, and how much of it."""

    shapes: list[Shape]
    arms: list[str]
    rounds: int
    agent: AgentShape = AgentShape()

    @property
    def steps(self) -> int:
        """How often ``on_step`` is called: jobs, and for each shape the reference job and the
        long hits."""
        return len(self.shapes) * (self.rounds * len(self.arms) + 2)


class Race:
    """Owns nothing: network, S3 server and progress are the caller's."""

    def __init__(
        self,
        plan: Plan,
        network: Network,
        s3: RadosGateway,
        logs: Path,
        say: Callable[[str], None],
        on_step: Callable[[], None],
    ) -> None:
        self._plan = plan
        self._network = network
        self._s3 = s3
        self._logs = logs
        self._say = say
        self._on_step = on_step

    def run(self, shape: Shape) -> ShapeResult:
        """Start a cluster of this shape and measure all arms with it."""
        config = cluster_config(
            shape.prefill,
            shape.decode,
            PORT,
            self._logs / shape.name,
            f"s3://{self._s3.bucket}/{REMOTE_FOLDER}",
            self._s3.options,
        )
        if ORACLE in self._plan.arms:
            config = dataclasses.replace(config, path_policy=ORACLE_CLASS)
        self._say(f"{shape.name}: links alone, by iperf3")
        storage = iperf.storage_rates(self._network, shape.nodes, IPERF_S)
        compute = iperf.compute_rates(self._network, shape.nodes, IPERF_S)
        self._say(f"{shape.name}: starting the cluster")
        race = _ShapeRace(self._network, shape, self._plan, self._empty_store, self._on_step)
        records = records_on(self._network, config)
        runs, long_hit_s = asyncio.run(in_cluster(records, config, self._say, race.run))
        return ShapeResult(shape, runs, storage, compute, long_hit_s)

    def _empty_store(self) -> None:
        """Whatever earlier jobs stored: it is under salts that are not used again."""
        import s3fs  # slow to import

        files: AbstractFileSystem = s3fs.S3FileSystem(
            skip_instance_cache=True, use_listings_cache=False, **self._s3.options
        )
        folder = f"{self._s3.bucket}/{REMOTE_FOLDER}/blocks"
        if files.exists(folder):
            files.rm(folder, recursive=True)


class _ShapeRace:
    def __init__(
        self,
        network: Network,
        shape: Shape,
        plan: Plan,
        empty_store: Callable[[], None],
        on_step: Callable[[], None],
    ) -> None:
        self._network = network
        self._shape = shape
        self._plan = plan
        self._empty_store = empty_store
        self._on_step = on_step
        self._work = Trajectories(AGENTS_PER_PREFILL * shape.prefill, plan.agent)

    async def run(self, gateway: Gateway) -> tuple[list[Run], dict[str, list[float]]]:
        """Reference and warm-up first, then rounds of all arms, then the long hits."""
        await self._job(gateway, N_WAY, "reference")
        self._on_step()
        runs = []
        for number in range(self._plan.rounds):
            for arm in rotated(self._plan.arms, number):
                runs.append(await self._job(gateway, arm, f"round-{number}", number))
                self._on_step()
        long_hit_s = await self._long_hits(gateway)
        self._on_step()
        return runs, long_hit_s

    async def _job(self, gateway: Gateway, arm: str, label: str, number: int = 0) -> Run:
        salt = f"{label}-{arm}"
        await self._store(gateway, self._work.contexts, salt)
        await gateway.set_policy(ORACLE_CLASS if arm == ORACLE else arm)
        before, cpu_s = await gateway.metrics(), machine.cpu_seconds()
        async with observed(self._network, self._shape.nodes) as use:
            job = await run_job(gateway, self._work, salt)
        cpu_s = machine.cpu_seconds() - cpu_s
        after = await gateway.metrics()
        gateway.check_alive()
        return Run(
            arm=arm,
            round=number,
            job=job,
            nics=use[0],
            storage_bytes=total(after, _READ_BYTES) - total(before, _READ_BYTES),
            differing=job.differing(self._work.answers),
            cpu_share=cpu_s / job.seconds / (os.cpu_count() or 1),
        )

    async def _store(self, gateway: Gateway, prompts: Sequence[list[int]], salt: str) -> None:
        """Fresh contexts in an otherwise empty store, written with the storage links open."""
        await gateway.wait_stored()
        await asyncio.to_thread(self._empty_store)
        with self._network.open_storage():
            await store_contexts(gateway, prompts, salt)

    async def _long_hits(self, gateway: Gateway) -> dict[str, list[float]]:
        """Basic and n-way in turns, the same prompt, nothing else under way."""
        prompt = [token for context in self._work.contexts for token in context]
        prompt, salt = prompt[: LONG_HIT_TOKENS + 1], f"long-hit-{time.monotonic_ns()}"
        await self._store(gateway, [prompt], salt)
        found: dict[str, list[float]] = {BASIC: [], N_WAY: []}
        for _ in range(LONG_HIT_PAIRS):
            for policy in found:
                await gateway.set_policy(policy)
                await gateway.metrics()  # the blocks of the request before have left all DRAM
                found[policy].append(await deliver_once(gateway, prompt, salt))
        return found


def rotated(arms: Sequence[str], by: int) -> list[str]:
    """Another arm begins each round. The oracle stays last: it measures the machine, not I/O."""
    real = [arm for arm in arms if arm != ORACLE]
    by = by % max(len(real), 1)
    return [*real[by:], *real[:by], *(arm for arm in arms if arm == ORACLE)]
