"""One ordinary SGLang server on a CPU: what it answers is right."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import os
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from benchmarks.own_cluster import HOST, ClusterFailed, tail
from engine.cpu.fork_server import COMMAND, Forked, ForkServer, Order
from launch.cluster.child import end_sessions
from launch.cluster.layout import page_tokens
from launch.cluster.tensor_parallel import cpu_env

START_TIMEOUT_S = 600.0
OTHERS = ("DUALPATH_", "PYTEST_")
"""Beginnings of names of variables that it does not have."""


@contextlib.contextmanager
def plain_sglang(model: Path, port: int, log: Path, *flags: str) -> Iterator[Callable[[], str]]:
    """Yields, at once, what waits until it serves and returns its URL; that raises
    :class:`ClusterFailed`. Ended at the end. ``flags`` come after the defaults, so they win."""
    argv = [*COMMAND, "--model-path", str(model)]
    argv += ["--device", "cpu", "--dtype", "float32", "--page-size", str(page_tokens(model))]
    argv += ["--max-total-tokens", "32768", "--host", HOST, "--port", str(port)]
    argv += ["--skip-server-warmup", "--sleep-on-idle", *flags]
    environment = {name: v for name, v in os.environ.items() if not name.startswith(OTHERS)}
    environment |= {
        "SGLANG_PLATFORM": "dualpath_cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **cpu_env(list(flags), model),
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = _started(Order(argv, environment), output)
    deadline = time.monotonic() + START_TIMEOUT_S

    @functools.cache
    def served() -> str:
        url = f"http://{HOST}:{port}"
        while time.monotonic() < deadline and not _has_ended(process.pid):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/model_info", timeout=5).close()
                return url
            time.sleep(0.3)
        raise ClusterFailed(f"plain SGLang did not start:\n{tail(log)}")

    try:
        yield served
    finally:
        asyncio.run(end_sessions([process.pid], grace_s=0))  # and what it has in /dev/shm
        process.wait()


def _started(order: Order, output: IO[bytes]) -> Forked | subprocess.Popen[bytes]:
    forked = None
    if threading.current_thread() is threading.main_thread():  # with another one they would end
        forked = asyncio.run(_fork_server().fork(order, output))
    return forked or subprocess.Popen(
        order.argv, stdout=output, stderr=output, env=order.env, start_new_session=True
    )


@functools.cache
def _fork_server() -> ForkServer:
    """Of all such servers of this process: what they import takes most of their start."""
    server = ForkServer()
    atexit.register(server.close)
    return server


def close_fork_server() -> None:
    """No more of them are to be started; it would be found among what a measurement has left."""
    _fork_server().close()
    _fork_server.cache_clear()


def _has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
