"""A trainer's calls for one update, in the order of slime and miles: the same for one server of
plain SGLang and for a cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from benchmarks.clients.trainer import Group, Tensors, described, serialized, tensors_of
from benchmarks.own_cluster import ClusterFailed
from benchmarks.weights.cases import DISK, IN_PLACE, TENSOR, Case, is_changed

CALL_TIMEOUT_S = 120.0
FLUSH_TIMEOUT_S = 60.0
"""As slime: engines refuse a flush while a request ends."""
LOOK_S = 0.02


class Update(msgspec.Struct):
    """When it was done, on the monotonic clock."""

    version: str
    begun_s: float
    """The pause is called."""
    updated_s: float = 0.0
    """The engines have the weights."""
    committed_s: float = 0.0
    """``/continue_generation`` has answered."""


class Trainer:
    """Of one server, or of one cluster."""

    def __init__(
        self, http: aiohttp.ClientSession, url: str, folders: Mapping[bool, Path], ranks: int
    ) -> None:
        """``folders``: by whether their weights are the changed ones. ``ranks``: all engines'."""
        self._http, self._url = http, url
        self._folders = folders
        self._tensors = {changed: tensors_of(folder) for changed, folder in folders.items()}
        self._ranks = ranks
        self._group: Group | None = None
        self.updates = 0

    async def join_group(self, port: int) -> None:
        """All engines that live now, and this process."""
        self._group = Group(f"benchmark-{port}", port, self._ranks + 1)  # a name once
        joining = self._group.join()
        await self._call("init_weights_update_group", self._group.body())
        await asyncio.to_thread(joining.join, CALL_TIMEOUT_S)

    async def leave_group(self) -> None:
        group = self._joined()
        await self._call("destroy_weights_update_group", {"group_name": group.name})
        self._group = None

    def _joined(self) -> Group:
        if self._group is None:
            raise ClusterFailed("no group was joined")
        return self._group

    async def update(self, case: Case, in_its_midst: Callable[[], None]) -> Update:
        """To the other weights; raises :class:`ClusterFailed` if a call is refused."""
        self.updates += 1
        version = str(self.updates)
        tensors = self._tensors[is_changed(version)]
        halves = [tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]]
        prepared = [serialized(half) for half in halves] if case.way == TENSOR else []
        done = Update(version, time.monotonic())
        await self._call("pause_generation", {"mode": case.mode})
        if case.mode != IN_PLACE:
            await self.flush()
        common = {"weight_version": version, "flush_cache": False}
        if case.way == DISK:
            folder = str(self._folders[is_changed(version)])
            await self._call("update_weights_from_disk", {"model_path": folder, **common})
        else:
            await self._call("begin_weight_update", {"selector": "all"})
            for number, half in enumerate(halves):
                if number:
                    in_its_midst()
                if case.way == TENSOR:
                    body = {"serialized_named_tensors": [prepared[number]], **common}
                    await self._call("update_weights_from_tensor", body)
                else:
                    await self._broadcast(half, common)
            await self._call("end_weight_update", {})
        done.updated_s = time.monotonic()
        await self._call("continue_generation", {})
        done.committed_s = time.monotonic()
        return done

    async def _broadcast(self, tensors: Tensors, common: dict[str, Any]) -> None:
        group = self._joined()
        sending = group.broadcast(tensors)
        body = {**described(tensors), "group_name": group.name, **common}
        await self._call("update_weights_from_distributed", body)
        await asyncio.to_thread(sending.join, CALL_TIMEOUT_S)

    async def flush(self) -> None:
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        while True:
            status, said = await self._post("flush_cache", {})
            if status == 200:
                return
            if time.monotonic() > deadline:
                raise ClusterFailed(f"flush_cache: {status} {said}")
            await asyncio.sleep(LOOK_S)

    async def _call(self, path: str, body: dict[str, Any]) -> None:
        status, said = await self._post(path, body)
        if status != 200:
            raise ClusterFailed(f"{path}: {status} {said}")

    async def _post(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT_S)
        try:
            async with self._http.post(
                f"{self._url}/{path}", json=body, timeout=timeout
            ) as response:
                return response.status, (await response.text())[:400]
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ClusterFailed(f"{path}: {error!r}") from error
