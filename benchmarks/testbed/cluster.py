"""The product's own processes, each on its host of the testbed, under the product's supervisor."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import aiohttp
import msgspec

from benchmarks.own_cluster import ClusterFailed
from benchmarks.supervised import Supervised, while_running
from benchmarks.testbed.network import Network, within
from common.experiment import Experiment
from common.process_settings import ProcessSettings
from engine.config import EngineConfig
from launch.cluster.config import ClusterConfig
from launch.cluster.hardware import Hardware
from launch.cluster.layout import PAGE_TOKENS, places_of
from launch.cluster.process_record import ProcessRecord
from launch.cluster.processes import process_records
from launch.gateway.request.trace import HEADER
from launch.models.resolve import resolve_model
from transfer.agent.config import AgentConfig

MODEL = "tiny"
BLOCK_BYTES = PAGE_TOKENS * 8 * 2 * 2 * 64 * 4
"""KV of the model's block: a page, 8 layers, K and V, 2 heads of 64 in float32."""
START_TIMEOUT_S = 240.0
JOIN_TIMEOUT_S = 30.0
STORED_TIMEOUT_S = 90.0
STATUS_S = 0.6
"""Agents report five times a second: after so long the gateway has heard their last count."""
REQUEST_TIMEOUT_S = 300.0


class Gateway:
    """Client of a cluster's HTTP API."""

    def __init__(self, http: aiohttp.ClientSession, supervised: Supervised) -> None:
        self._http = http
        self._supervised = supervised

    async def generate(self, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Answer and trace of one ``/generate``; raises :class:`ClusterFailed`."""
        async with self._http.post("/generate", json=body) as response:
            text = await response.text()
            if response.status != 200:
                raise ClusterFailed(f"HTTP {response.status}: {text[:300]}")
            trace = msgspec.json.decode(response.headers[HEADER])
            return msgspec.json.decode(text), trace

    async def set_policy(self, name: str) -> None:
        """From the next request on."""
        async with self._http.post("/admin/policy", json={"path_policy": name}) as response:
            if response.status != 200:
                raise ClusterFailed(f"policy {name}: {await response.text()}")

    async def cluster(self) -> dict[str, Any]:
        """What the scheduler sees: ``/admin/cluster``."""
        async with self._http.get("/admin/cluster") as response:
            return msgspec.json.decode(await response.read())

    async def wait_joined(self, engines: set[str]) -> None:
        """Until the gateway knows all of these: it is ready when it has heard of some."""

        async def known() -> set[str]:
            return {e["name"] for e in (await self.cluster())["engines"] if e["alive"]}

        async with asyncio.timeout(JOIN_TIMEOUT_S):
            while not engines <= await known():
                await asyncio.sleep(0.1)

    async def drain(self, name: str, on: bool) -> None:
        """An engine gets no new requests while it is drained."""
        async with self._http.post("/admin/drain", json={"name": name, "on": on}) as response:
            if response.status != 200:
                raise ClusterFailed(f"drain {name}: {await response.text()}")

    async def metrics(self) -> dict[str, float]:
        """Every sample, by name with labels, once the agents have reported what was done."""
        await asyncio.sleep(STATUS_S)
        async with self._http.get("/metrics") as response:
            lines = (await response.text()).splitlines()
        pairs = (line.rpartition(" ") for line in lines if line and line[0] != "#")
        return {name: float(value) for name, _, value in pairs}

    async def wait_stored(self) -> dict[str, float]:
        """Until every full block of the engines is in the remote store; returns the metrics."""
        async with asyncio.timeout(STORED_TIMEOUT_S):
            while True:
                metrics = await self.metrics()
                self.check_alive()
                names = ("dualpath:engine_open_jobs", 'state="volatile"')
                if not any(total(metrics, name) for name in names):
                    return metrics

    def check_alive(self) -> None:
        """Raises :class:`ClusterFailed` if any process had to be started again."""
        if self._supervised.deaths:
            raise ClusterFailed("; ".join(self._supervised.deaths))


def total(metrics: dict[str, float], part: str) -> float:
    """Sum of all samples whose name contains ``part``."""
    return sum(value for name, value in metrics.items() if part in name)


def cluster_config(
    prefill: int, decode: int, port: int, folder: Path, remote: str, options: dict[str, Any]
) -> ClusterConfig:
    """SSD off, and DRAM for what is in flight; every hit is loaded. Long queues at the
    slowed-down storage NICs are the point, so no read of a job may time out."""
    return ClusterConfig(
        model=MODEL,
        prefill=prefill,
        decode=decode,
        port=port,
        device="cpu",
        transfer="tcp",
        dram_bytes=512 << 20,
        ssd_bytes=0,
        remote=remote,
        remote_options=options,
        path_policy="prefill",
        load_policy="always",
        read_timeout_s=120.0,
        deliver_timeout_s=60.0,
        log_dir=str(folder),
        start_timeout_s=START_TIMEOUT_S,
    )


FORGETTING = Experiment(keep_prefixes=False)


class EngineChange(NamedTuple):
    """How one engine differs from the others."""

    settings: dict[str, Any] = {}
    """Fields of :class:`EngineConfig`."""
    experiment: Experiment = FORGETTING
    flags: tuple[str, ...] = ()
    """SGLang flags; they win."""


def records_on(
    network: Network,
    config: ClusterConfig,
    changes: Mapping[str, EngineChange] = MappingProxyType({}),
    dram_keep: bool = False,
) -> list[ProcessRecord]:
    """The cluster's records, each node's to be started in the node's namespace; engines, and
    agents unless ``dram_keep``, do not keep what no request needs."""
    hosts = {node: network.compute_address(node) for node in places_of(config)}
    hardware = Hardware("cpu", "tcp", "the testbed has no other")
    node_at = {address: node for node, address in hosts.items()}
    records = process_records(config, resolve_model(MODEL), hardware, hosts)
    moved = [_moved(record, network, node_at.get(record.host), dram_keep) for record in records]
    return [_changed(record, changes.get(record.name, EngineChange())) for record in moved]


def _moved(
    record: ProcessRecord, network: Network, node: str | None, dram_keep: bool
) -> ProcessRecord:
    if node is None:  # the gateway is in the control namespace, as its supervisor is
        return record
    env = dict(record.env)
    if record.kind == "agent":
        experiment = AgentConfig.from_env(env).experiment
        experiment = msgspec.structs.replace(experiment, dram_keep=dram_keep)
        _change(env, AgentConfig, experiment=experiment)
    argv = (*within(network.namespace(node)), *record.argv)
    return dataclasses.replace(record, argv=argv, env=env, is_forked=False)


def _changed(record: ProcessRecord, change: EngineChange) -> ProcessRecord:
    if record.kind != "engine":
        return record
    env = dict(record.env)
    _change(env, EngineConfig, experiment=change.experiment, **change.settings)
    return dataclasses.replace(record, argv=(*record.argv, *change.flags), env=env)


def _change(env: dict[str, str], kind: type[ProcessSettings], **fields: Any) -> None:
    env |= msgspec.structs.replace(kind.from_env(env), **fields).to_env()


_Result = TypeVar("_Result")


async def in_cluster(
    records: Sequence[ProcessRecord],
    config: ClusterConfig,
    say: Callable[[str], None],
    work: Callable[[Gateway], Awaitable[_Result]],
) -> _Result:
    """Start the cluster, do the work, end it; nothing of it is left, whatever happens.

    Raises :class:`ClusterFailed`, ``StartFailed``, and ``KeyboardInterrupt`` when a signal has
    ended the cluster (its supervisor takes the process's signals while it runs).
    """
    supervised = Supervised(say)

    async def at_the_gateway() -> _Result:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        url = f"http://{config.host}:{config.port}"
        async with aiohttp.ClientSession(url, timeout=timeout, read_bufsize=1 << 22) as http:
            gateway = Gateway(http, supervised)
            await gateway.wait_joined({r.name for r in records if r.kind == "engine"})
            return await work(gateway)

    return await while_running(
        records, config.log_folder, config.start_timeout_s, supervised, at_the_gateway
    )
