"""A whole cluster on two hosts whose links tell the classes apart: who sends in which?

What the kernel has counted in the two queues of the compute links, beside what agents and engines
say that they have sent there.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec

from benchmarks.own_cluster import ClusterFailed
from benchmarks.testbed.cluster import Gateway, cluster_config, in_cluster, records_on
from benchmarks.testbed.workload import AgentShape, Trajectories, ask
from benchmarks.traffic.hosts import DEVICE, SETTINGS, Link
from transfer.traffic.classes import TrafficClass

PREFILL, DECODE = "p0", "d0"
PORT = 32300
REQUESTS = 6
OUTPUT_TOKENS = 13
SALT = "traffic"


class ClusterSample(msgspec.Struct):
    """Of all requests together. ``link_bytes``: the kernel's count, headers and all;
    ``moved_bytes``: the processes' own. By class."""

    requests: int = 0
    other_answers: int = 0
    """Hits whose answer is not that of the same prompt before it was stored."""
    link_bytes: dict[str, int] = {}
    moved_bytes: dict[str, int] = {}


def measure(link: Link, folder: Path, say: Callable[[str], None]) -> ClusterSample:
    """``link`` is between hosts of the names PREFILL and DECODE. Every prompt is asked for
    twice: the second time, the decode node's agent delivers its KV to both engines. Raises
    ``ClusterFailed`` and ``StartFailed``."""
    link.set_classes(True)
    config = dataclasses.replace(
        cluster_config(1, 1, PORT, folder, f"file://{folder}/remote", {}),
        path_policy="decode",
        traffic=SETTINGS,
    )
    records = records_on(link.network, config, dram_keep=True)

    async def work(gateway: Gateway) -> ClusterSample:
        return await _ask(link, gateway)

    with link.network.entered():
        return asyncio.run(in_cluster(records, config, say, work))


async def _ask(link: Link, gateway: Gateway) -> ClusterSample:
    sample = ClusterSample()
    prompts = Trajectories(REQUESTS, AgentShape()).contexts
    before = link.sent_bytes(), moved_bytes(await gateway.metrics())
    for ids in prompts:
        cold, _ = await ask(gateway, ids, OUTPUT_TOKENS, SALT)
        await gateway.wait_stored()
        hit, trace = await ask(gateway, ids, OUTPUT_TOKENS, SALT)
        if not trace["delivered_bytes"]:
            raise ClusterFailed("the prompt was no hit when asked for again")
        sample.requests += 2
        sample.other_answers += cold != hit
    after = link.sent_bytes(), moved_bytes(await gateway.wait_stored())
    sample.link_bytes, sample.moved_bytes = (
        {name: now[name] - then[name] for name in now}
        for then, now in zip(before, after, strict=True)
    )
    return sample


def moved_bytes(metrics: dict[str, float]) -> dict[str, int]:
    """What agents and engines have sent over the compute links, by class."""
    over_link = {
        name: int(value)
        for name, value in metrics.items()
        if "_moved_bytes_total{" in name and f'nic="{DEVICE}"' in name
    }
    return {
        of.value: sum(n for name, n in over_link.items() if f'class="{of.value}"' in name)
        for of in TrafficClass
    }
