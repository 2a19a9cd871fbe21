"""One ordinary SGLang server on a CPU: what it answers is right."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.own_cluster import HOST, ClusterFailed, tail
from launch.cluster.child import end_sessions
from launch.cluster.layout import page_tokens
from launch.cluster.tensor_parallel import cpu_env

START_TIMEOUT_S = 600.0


@contextlib.contextmanager
def plain_sglang(model: Path, port: int, log: Path, *flags: str) -> Iterator[Callable[[], str]]:
    """Yields, at once, what waits until it serves and returns its URL; that raises
    :class:`ClusterFailed`. Ended at the end. ``flags`` come after the defaults, so they win."""
    argv = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
    argv += ["--device", "cpu", "--dtype", "float32", "--page-size", str(page_tokens(model))]
    argv += ["--max-total-tokens", "32768", "--host", HOST, "--port", str(port)]
    argv += ["--skip-server-warmup", "--sleep-on-idle", *flags]
    environment = {name: v for name, v in os.environ.items() if not name.startswith("DUALPATH_")}
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
        process = subprocess.Popen(
            argv, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    deadline = time.monotonic() + START_TIMEOUT_S

    @functools.cache
    def served() -> str:
        url = f"http://{HOST}:{port}"
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/model_info", timeout=5).close()
                return url
            time.sleep(0.3)
        raise ClusterFailed(f"plain SGLang did not start:\n{tail(log)}")

    try:
        yield served
    finally:
        asyncio.run(end_sessions([process.pid], grace_s=0))  # and what it has in /dev/shm
        process.wait(10)
