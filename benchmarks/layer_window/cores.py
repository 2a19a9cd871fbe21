"""Whose work runs on which core, so that moving bytes takes no time from the forwards.

On hardware a NIC moves KV while the device computes. Here both take CPU time. So the threads
that run the prefill engines' forwards get a core for themselves, and everything else (agents,
senders and receivers of bytes, the decode engine, gateway and this process) gets the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator

import psutil

PERIOD_S = 2.0
"""Between two looks for threads that have been started since."""
PREFILL_FLAGS = ("--disaggregation-mode", "prefill")
SCHEDULER = "sglang::scheduler"


class CoresNotApart(Exception):
    """Forwards and transfers would share a core."""


@contextlib.asynccontextmanager
async def apart() -> AsyncIterator[None]:
    """Keep the processes under this one so while the block runs."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise CoresNotApart("this benchmark needs two cores")
    pin(psutil.Process(), cores)  # raises here what it can raise
    task = asyncio.create_task(_keep(cores))
    try:
        yield
    finally:
        task.cancel()


async def _keep(cores: list[int]) -> None:
    while True:
        await asyncio.sleep(PERIOD_S)
        pin(psutil.Process(), cores)


def pin(launcher: psutil.Process, cores: list[int]) -> None:
    """Of the launcher and all processes under it: the first core is the forwards'. Raises
    :class:`CoresNotApart` if there are no forwards."""
    forwards = set(_forward_threads(launcher))
    if not forwards:
        raise CoresNotApart(f"no process {SCHEDULER} of a prefill engine was found")
    for process in [launcher, *launcher.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            for thread in process.threads():
                mask = cores[:1] if thread.id in forwards else cores[1:]
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, mask)


def _forward_threads(launcher: psutil.Process) -> Iterator[int]:
    """SGLang runs forwards in the main thread of its scheduler process."""
    for engine in launcher.children():
        with contextlib.suppress(psutil.Error):
            argv = engine.cmdline()
            if PREFILL_FLAGS not in zip(argv, argv[1:], strict=False):
                continue
            for process in engine.children(recursive=True):
                if any(part.startswith(SCHEDULER) for part in process.cmdline()):
                    yield process.pid
