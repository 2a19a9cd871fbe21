"""Ports for what tests start."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket

_PORTS = range(4096, 10240)
"""Below those of all else here, and those that the kernel gives to outgoing connections."""
_PROCESSES_MAX = 8


def place_of_worker() -> int:
    """This test process's among those of one run; 0 if it is the only one."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    return int(worker.removeprefix("gw")) + 1 if worker else 0


def _own() -> range:
    """This test process's: what it is about to bind no other one may find free."""
    return _PORTS[place_of_worker() % _PROCESSES_MAX :: _PROCESSES_MAX]


_next = itertools.islice(itertools.cycle(_own()), os.getpid() % 700, None)
"""From another one on in each process, as a worker's own ones may look for some, too."""


def free_port() -> int:
    """Not the one of a moment ago, which may not have been bound yet."""
    for port in itertools.islice(_next, len(_PORTS) // _PROCESSES_MAX):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no free port in {_PORTS}")
