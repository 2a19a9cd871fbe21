"""What the testbed needs of a machine beside programs, checked before anything is started."""

from __future__ import annotations

import os
import re
from pathlib import Path

from benchmarks.testbed.network import PREFIX, Network, NetworkFailed, Rates
from launch.cluster.preflight import available_memory_bytes

ENGINE_BYTES = 2_300_000_000
"""Resident memory of a SGLang engine with the model ``tiny`` and of its agent, measured."""
REST_BYTES = 2_500_000_000
"""S3 server with a job's blocks, gateway, the benchmark itself."""


def troubles(engines_max: int) -> list[str]:
    """Sentences that say why the testbed cannot run here; empty when it can."""
    found = []
    needed, available = REST_BYTES + engines_max * ENGINE_BYTES, available_memory_bytes()
    if available < needed:
        found.append(
            f"{engines_max} engines need {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB "
            "are available: leave shapes out with --shapes"
        )
    if reason := _no_limited_links():
        found.append(f"the kernel makes no rate-limited link between namespaces: {reason}")
    return found


def _no_limited_links() -> str:
    network = Network(["probe"], Rates(100, 800))
    try:
        network.build()
        network.remove()
    except NetworkFailed as error:
        return str(error)
    return ""


def cpu_seconds() -> float:
    """Busy time of all cores together since the start of the machine."""
    return busy_seconds(Path("/proc/stat").read_text())


def busy_seconds(stat: str) -> float:
    """The same from the text of ``/proc/stat``: all but idle and waiting for a disk."""
    ticks = list(map(int, stat.split("\n", 1)[0].split()[1:9]))
    idle, waiting = ticks[3], ticks[4]
    return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def describe() -> dict[str, object]:
    """For the report: what the figures were measured on."""
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return {
        "cores": os.cpu_count(),
        "cpu": model[1] if model else "unknown",
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": os.uname().release,
    }


def scratch_prefix() -> str:
    """Of this run's folders, so that a later run can tell whose they are."""
    return f"{PREFIX}{os.getpid()}-"
