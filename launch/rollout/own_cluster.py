"""A cluster for one job: ``launch.cluster`` with the job's flags, ended with the job."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp

from launch.rollout.config import RolloutConfig
from launch.settings import BadConfig

POLL_S = 0.5
STOP_S = 30.0
_PR_SET_PDEATHSIG = 1
_TAIL_LINES = 25


@contextlib.asynccontextmanager
async def own_cluster(config: RolloutConfig, log: Path) -> AsyncIterator[str]:
    """URL of a cluster that serves; raises :class:`BadConfig` if it did not come up.

    It ends with this process even if that is killed.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.cluster", *config.cluster_flags()],
            env=os.environ | config.cluster_secrets(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the job, which ends the cluster last
            preexec_fn=ending_with_us(),
        )
    try:
        scheme = "https" if config.ssl_certfile else "http"
        url = f"{scheme}://{config.host}:{config.port}"
        await _healthy(process, url, log, config.start_timeout_s)
        yield url
    finally:
        await asyncio.to_thread(stop, process)


def ending_with_us() -> Callable[[], None]:
    """For a child to call before it begins: it gets SIGTERM when this process ends, however."""
    libc, parent = ctypes.CDLL(None), os.getpid()

    def end_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return end_with_parent


async def _healthy(process: subprocess.Popen[bytes], url: str, log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    timeout = aiohttp.ClientTimeout(total=5)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with http.get(f"{url}/health", ssl=False) as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(POLL_S)
    lines = log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
    raise BadConfig("\n".join([*lines, f"the cluster did not start; its output is in {log}"]))


def stop(process: subprocess.Popen[bytes], timeout_s: float = STOP_S) -> None:
    """SIGTERM, and SIGKILL for all its processes (its session) if it has not ended by then."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
