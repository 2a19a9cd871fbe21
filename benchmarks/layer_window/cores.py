"""Whose work runs on which core, so that moving bytes takes little time from the forwards.

On hardware a NIC moves KV while the device computes. Here both take CPU time. So the threads
that run the prefill engines' forwards get a core, and the other processes (agents, the decode
engine, gateway and this one) the rest. The prefill engines' other threads, which receive, may
run anywhere.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

import psutil

PREFILL_FLAGS = ("--disaggregation-mode", "prefill")
SCHEDULER = "sglang::scheduler"


class CoresNotApart(Exception):
    """Forwards and transfers would share a core."""


def keep_apart(launcher: psutil.Process, cores: list[int]) -> None:
    """Of the launcher and all processes under it: the first core is the forwards'.

    Threads that a process starts later run where the one that starts them does. Raises
    :class:`CoresNotApart` if that is not possible.
    """
    if len(cores) < 2:
        raise CoresNotApart("this benchmark needs two cores")
    schedulers = set(_prefill_schedulers(launcher))
    if not schedulers:
        raise CoresNotApart(f"no process {SCHEDULER} of a prefill engine was found")
    for process in [launcher, *launcher.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            mask = cores if process.pid in schedulers else cores[1:]
            _set_affinity((thread.id for thread in process.threads()), mask)
    _set_affinity(schedulers, cores[:1])  # SGLang runs forwards in the main thread


def _set_affinity(threads: Iterable[int], mask: list[int]) -> None:
    for thread in threads:
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread, mask)


def _prefill_schedulers(launcher: psutil.Process) -> Iterator[int]:
    for engine in launcher.children():
        with contextlib.suppress(psutil.Error):
            argv = engine.cmdline()
            if PREFILL_FLAGS not in zip(argv, argv[1:], strict=False):
                continue
            for process in engine.children(recursive=True):
                if any(part.startswith(SCHEDULER) for part in process.cmdline()):
                    yield process.pid
