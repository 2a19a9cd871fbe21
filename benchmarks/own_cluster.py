"""A cluster of this repository on free ports, with stores of its own, for one measurement."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec
import psutil

from launch.rollout.own_cluster import stop

HOST = "127.0.0.1"
PORT_FIRST, PORT_LAST, PORT_STEP = 20000, 31000, 640
"""Below the ports that the kernel gives to outgoing connections. The launcher takes the
ports of the other processes from --port + 100 on."""
PROBED_OFFSETS = (0, *range(100, PORT_STEP))
STOP_TIMEOUT_S = 20.0
TAIL_LINES = 40
NO_VARIABLES: Mapping[str, str] = MappingProxyType({})


class ClusterFailed(Exception):
    """It ended, was not healthy in time, or gave no answer."""


@contextlib.contextmanager
def own_cluster(
    policy: str,
    flags: Sequence[str],
    start_timeout_s: float,
    variables: Mapping[str, str] = NO_VARIABLES,
    tree: Path | None = None,
) -> Iterator[str]:
    """URL of a running cluster with this path policy; it and its stores go away at the end.

    ``flags`` come after the defaults, so they win; ``variables`` are in its environment; ``tree``
    is another source tree than this one. The DRAM tier is small beside what a replay stores, and
    the remote folder is shared, so that both sides do read storage.
    """
    with tempfile.TemporaryDirectory(prefix="dualpath-benchmark-") as folder:
        store, port = Path(folder), free_port()
        output = store / "launcher.log"
        with output.open("wb") as sink:
            process = subprocess.Popen(
                [*launcher(policy, port, store), *flags],
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables},
                cwd=tree,
                start_new_session=True,
            )
        try:
            url = f"http://{HOST}:{port}"
            _wait_healthy(process, url, output, start_timeout_s)
            yield url
        finally:
            stop(process, STOP_TIMEOUT_S)


def launcher(policy: str, port: int, store: Path) -> list[str]:
    """Command line of a cluster that keeps everything under ``store``."""
    (store / "remote").mkdir()
    return [
        *(sys.executable, "-m", "launch.cluster", "--model", "tiny", "--host", HOST),
        *("--port", str(port), "--path-policy", policy),
        *("--dram-bytes", "256MiB", "--ssd-dir", str(store / "ssd"), "--ssd-bytes", "4GiB"),
        *("--remote", (store / "remote").as_uri(), "--log-dir", str(store / "logs")),
        *("--load-policy", "always"),  # every hit is to be seen
    ]


def free_port() -> int:
    """A port that is free now, with free ports where the launcher puts the other processes."""
    start = PORT_FIRST + os.getpid() % 8 * PORT_STEP
    for port in range(start, PORT_LAST, PORT_STEP):
        if all(_is_free(port + offset) for offset in PROBED_OFFSETS):
            return port
    raise ClusterFailed(f"no free port between {start} and {PORT_LAST}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _wait_healthy(
    process: subprocess.Popen[bytes], url: str, output: Path, timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ClusterFailed(f"launch.cluster exited with {process.returncode}:\n{tail(output)}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, http.client.HTTPException, OSError):
            time.sleep(0.5)
    raise ClusterFailed(f"launch.cluster not healthy after {timeout_s:g} s:\n{tail(output)}")


def tail(output: Path) -> str:
    """The last lines of a log."""
    return "\n".join(output.read_text(errors="replace").splitlines()[-TAIL_LINES:])


def name_of(process: psutil.Process) -> str:
    """What a cluster calls one of its processes, by the settings that it was started with."""
    with contextlib.suppress(psutil.Error):
        environment = process.environ()
        for variable in ("DUALPATH_AGENT", "DUALPATH_ENGINE"):
            if variable in environment:
                name: str = msgspec.json.decode(environment[variable])["name"]
                return name
        if "DUALPATH_GATEWAY" in environment:
            return "gateway"
    return ""


def pids_of(name: str) -> list[int]:
    """All processes of an agent or an engine of this process's own cluster."""
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if name_of(child) == name]
