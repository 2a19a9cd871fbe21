"""How each kind of fault is done, and undone."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import own_clock
from benchmarks.clients.load import Weights
from benchmarks.clients.reference import FIRST, SECOND
from benchmarks.faults import damage, hostile
from benchmarks.faults.cluster import SUPERVISOR, Cluster
from benchmarks.faults.schedule import Fault
from benchmarks.faults.stage import Disk, Stage
from benchmarks.own_cluster import ClusterFailed

LOSS_PERCENT = 5
CLOCK_STEP_S = 7200
SECOND_WEIGHTS_S = 12.0
UPDATE_TRIES = 30
UPDATE_PAUSE_S = 2.0
UNMOUNT_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Scene:
    """What there is to break."""

    cluster: Cluster
    stage: Stage
    url: str
    weights: Weights
    models: dict[str, Path]
    """By the version of their weights."""


Act = Callable[[Scene, Fault, random.Random], Awaitable[str]]
"""Returns, once all is undone, what was done."""


class Busy(Exception):
    """The same thing is broken already."""


async def perform(scene: Scene, fault: Fault) -> str:
    return await ACTS[fault.kind](scene, fault, random.Random(fault.seed))


# ---- processes ------------------------------------------------------------------------------


async def _kill(scene: Scene, fault: Fault, rng: random.Random) -> str:
    return f"killed {scene.cluster.signal(fault.target, signal.SIGKILL)}"


async def _kill_supervisor(scene: Scene, fault: Fault, rng: random.Random) -> str:
    scene.cluster.signal(SUPERVISOR, signal.SIGKILL)
    await asyncio.sleep(1.0)  # its children end with it
    await scene.cluster.serve_again()
    return "started again"


async def _suspend(scene: Scene, fault: Fault, rng: random.Random) -> str:
    pids = scene.cluster.signal(fault.target, signal.SIGSTOP)
    try:
        await asyncio.sleep(fault.lasts_s)
    finally:
        scene.cluster.resume(pids)
    return f"suspended {pids}"


# ---- S3 ---------------------------------------------------------------------------------------


async def _kill_s3(scene: Scene, fault: Fault, rng: random.Random) -> str:
    scene.stage.s3.signal_gateway(signal.SIGKILL)
    await asyncio.sleep(fault.lasts_s)
    await asyncio.to_thread(scene.stage.s3.start_gateway)
    return "started again"


async def _suspend_s3(scene: Scene, fault: Fault, rng: random.Random) -> str:
    scene.stage.s3.signal_gateway(signal.SIGSTOP)
    try:
        await asyncio.sleep(fault.lasts_s)
    finally:
        scene.stage.s3.signal_gateway(signal.SIGCONT)
    return ""


async def _s3_answers(scene: Scene, fault: Fault, rng: random.Random) -> str:
    scene.stage.spoil_s3(fault.target, rng)
    try:
        await asyncio.sleep(fault.lasts_s)
    finally:
        scene.stage.spoil_s3("", rng)
    return ""


# ---- network, disks, clock ---------------------------------------------------------------------


async def _partition(scene: Scene, fault: Fault, rng: random.Random) -> str:
    return await _dropping(scene, fault, 100)


async def _loss(scene: Scene, fault: Fault, rng: random.Random) -> str:
    return await _dropping(scene, fault, LOSS_PERCENT)


async def _dropping(scene: Scene, fault: Fault, percent: int) -> str:
    await asyncio.to_thread(scene.stage.drop, fault.target, percent)
    try:
        await asyncio.sleep(fault.lasts_s)
    finally:
        await asyncio.to_thread(scene.stage.drop, fault.target, 0)
    return ""


async def _full_disk(scene: Scene, fault: Fault, rng: random.Random) -> str:
    disk = scene.stage.disks[fault.target]
    await asyncio.to_thread(disk.fill)
    try:
        await asyncio.sleep(fault.lasts_s)
    finally:
        disk.empty()
    return ""


async def _read_only_disk(scene: Scene, fault: Fault, rng: random.Random) -> str:
    """Until it is replaced, which takes a new agent: nobody else lets go of the old one."""
    disk, cluster = scene.stage.disks[fault.target], scene.cluster
    disk.break_()
    await asyncio.sleep(fault.lasts_s)
    supervisor = cluster.signal(SUPERVISOR, signal.SIGSTOP)  # it would start the agent too soon
    try:
        killed = await _unmount(disk, cluster, fault.target)
        await asyncio.to_thread(disk.replace)
    finally:
        cluster.resume(supervisor)
    return f"replaced; killed {killed}"


async def _unmount(disk: Disk, cluster: Cluster, agent: str) -> list[int]:
    """End the agent, however often it takes: the supervisor was just starting it, another fault
    let the supervisor go on, or the kernel has not closed the files of one that is gone."""
    deadline = time.monotonic() + UNMOUNT_TIMEOUT_S
    killed: list[int] = []
    while True:
        pids = cluster.signal(agent, signal.SIGKILL)
        killed += pids
        await cluster.wait_gone(pids)
        try:
            await asyncio.to_thread(disk.unmount)
            return killed
        except ClusterFailed:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.1)


async def _clock(scene: Scene, fault: Fault, rng: random.Random) -> str:
    step_s = rng.choice((-CLOCK_STEP_S, CLOCK_STEP_S))
    own_clock.write_offset(scene.stage.clock, step_s)
    try:
        await asyncio.sleep(fault.lasts_s)
    finally:
        own_clock.write_offset(scene.stage.clock, 0)
    return f"{step_s:+d} s"


# ---- bytes ------------------------------------------------------------------------------------


async def _damage_ssd(scene: Scene, fault: Fault, rng: random.Random) -> str:
    slabs = scene.stage.disks[fault.target].slabs()
    return await asyncio.to_thread(damage.damage_file, slabs, fault.kind == "flip-ssd", rng)


async def _damage_remote(scene: Scene, fault: Fault, rng: random.Random) -> str:
    flips = fault.kind == "flip-remote"
    files, folder = await asyncio.to_thread(scene.stage.objects)
    return await asyncio.to_thread(damage.damage_object, files, folder, flips, rng)


# ---- operators and clients -----------------------------------------------------------------------


async def _weights(scene: Scene, fault: Fault, rng: random.Random) -> str:
    """Others for a while. An engine that starts meanwhile has the first ones."""
    scene.weights.allow(FIRST, SECOND)
    said = [await _update(scene, name, SECOND) for name in scene.cluster.names("engine")]
    await asyncio.sleep(fault.lasts_s + SECOND_WEIGHTS_S)
    for name in scene.cluster.names("engine"):
        for _ in range(UPDATE_TRIES):
            if (await _update(scene, name, FIRST)).startswith("200"):
                break
            await asyncio.sleep(UPDATE_PAUSE_S)
        else:
            return f"{name} could not be given the first weights again: both are right from now on"
    scene.weights.allow(FIRST)
    return "; ".join(answer[:60] for answer in said)


async def _update(scene: Scene, name: str, version: str) -> str:
    url = f"/admin/engine/{name}/update_weights_from_disk"
    body = {"model_path": str(scene.models[version]), "weight_version": version}
    return await scene.cluster.operator.order(url, body)


async def _policy(scene: Scene, fault: Fault, rng: random.Random) -> str:
    said = await scene.cluster.operator.order("/admin/policy", {"path_policy": fault.target})
    await asyncio.sleep(fault.lasts_s)
    await scene.cluster.operator.order("/admin/policy", {"path_policy": "n-way"})
    return said


async def _drain(scene: Scene, fault: Fault, rng: random.Random) -> str:
    said = await scene.cluster.operator.order("/admin/drain", {"name": fault.target, "on": True})
    await asyncio.sleep(fault.lasts_s)
    while not (await _undrain(scene, fault.target)).startswith("200"):
        await asyncio.sleep(1.0)  # the gateway is away
    return said


async def _undrain(scene: Scene, name: str) -> str:
    return await scene.cluster.operator.order("/admin/drain", {"name": name, "on": False})


async def _flush(scene: Scene, fault: Fault, rng: random.Random) -> str:
    return await scene.cluster.operator.order("/flush_cache", {})


async def _hostile(scene: Scene, fault: Fault, rng: random.Random) -> str:
    return "; ".join(await hostile.attack(scene.url, rng))


ACTS: dict[str, Act] = {
    "kill": _kill,
    "kill-part": _kill,
    "kill-supervisor": _kill_supervisor,
    "suspend": _suspend,
    "kill-s3": _kill_s3,
    "suspend-s3": _suspend_s3,
    "partition": _partition,
    "loss": _loss,
    "s3-answers": _s3_answers,
    "full-disk": _full_disk,
    "read-only-disk": _read_only_disk,
    "flip-ssd": _damage_ssd,
    "tear-ssd": _damage_ssd,
    "flip-remote": _damage_remote,
    "tear-remote": _damage_remote,
    "clock": _clock,
    "hostile": _hostile,
    "weights": _weights,
    "policy": _policy,
    "drain": _drain,
    "flush": _flush,
}
