"""Processes under the product's supervisor for as long as one piece of work takes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from launch.cluster.process_record import ProcessRecord
from launch.cluster.supervisor import Supervisor

_Result = TypeVar("_Result")


class Supervised:
    """What the supervisor reports: whether all processes serve, and that none has died."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.is_serving = asyncio.Event()
        self.deaths: list[str] = []
        self._say = say

    def ready(self, name: str, seconds: float) -> None:
        self._say(f"{name} ready after {seconds:.0f} s")

    def waiting(self, names: Sequence[str], seconds: float) -> None:
        pass

    def serving(self) -> None:
        self.is_serving.set()

    def restarting(self, name: str, reason: str, delay_s: float) -> None:
        self.deaths.append(f"{name} {reason}")
        self._say(f"{name} {reason}: starting it again")

    def stopping(self, reason: str) -> None:
        self._say(reason)


async def while_running(
    records: Sequence[ProcessRecord],
    log_folder: Path,
    start_timeout_s: float,
    supervised: Supervised,
    work: Callable[[], Awaitable[_Result]],
) -> _Result:
    """Start the processes, do the work when all serve, end them; nothing of them is left,
    whatever happens.

    Raises ``StartFailed``, what the work raises, and ``KeyboardInterrupt`` when a signal has
    ended them (the supervisor takes this process's signals while it runs).
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    supervisor = Supervisor(records, log_folder, supervised, start_timeout_s)
    tasks = [
        running := asyncio.create_task(supervisor.run()),
        working := asyncio.create_task(_when_serving(supervised, work)),
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        running.result()
        raise KeyboardInterrupt
    finally:
        for task in reversed(tasks):
            task.cancel()
            await asyncio.wait([task])


async def _when_serving(supervised: Supervised, work: Callable[[], Awaitable[_Result]]) -> _Result:
    await supervised.is_serving.wait()
    return await work()
