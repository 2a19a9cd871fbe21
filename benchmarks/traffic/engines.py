"""A decode engine of two ranks, one on each host: its collectives cross the link for each token."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.testbed.network import within
from benchmarks.traffic.hosts import DEVICE, RECEIVER, SENDER, Link, Worker
from benchmarks.traffic.measure import INFERENCE_CORE, SETTLE_S, Arm, Bench, Rounds, Sample
from engine.config import EngineConfig
from launch.cluster.config import ClusterConfig
from launch.cluster.hardware import Hardware
from launch.cluster.process_record import ProcessRecord
from launch.cluster.processes import process_records
from launch.models.resolve import resolve_model

PORT, RENDEZVOUS_PORT, BASE_PORT = 30000, 29400, 31000
START_S = 240.0
PROMPT_TOKENS, TOKENS = 64, 64
_OWN_SHARED_MEMORY = ("sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh")
"""As on two hosts: ranks that see each other's shared memory look for each other on 127.0.0.1."""
ARMS = (
    Arm("control", kv="storage", has_classes=True),
    Arm("classes", has_classes=True),
    Arm("pacer alone", pace="on"),
    Arm("neither"),
)


class EngineFailed(Exception):
    """The engine does not serve; the text is the end of its log."""


def measure(
    link: Link, rounds: int, folder: Path, step: Callable[[], object], found: Rounds
) -> None:
    """TPOT of each arm in turn, into ``found``. Raises :class:`EngineFailed`. Logs go into
    ``folder``."""
    bench = Bench(link)
    try:
        with _engine(link, folder):
            client = link.start("client", SENDER, INFERENCE_CORE)
            for _ in range(2):  # warm
                client.ask("run", port=PORT, prompt_tokens=PROMPT_TOKENS, tokens=TOKENS)
            for number in range(rounds):
                for arm in ARMS if number % 2 == 0 else ARMS[::-1]:
                    found.setdefault(arm.name, []).append(_one(bench, arm, client))
                    step()
            client.close()
    finally:
        bench.close()


def _one(bench: Bench, arm: Arm, client: Worker) -> Sample:
    sample = Sample()

    def work() -> None:
        answer = client.ask("run", port=PORT, prompt_tokens=PROMPT_TOKENS, tokens=TOKENS)
        sample.tpot_s = answer["tpot_s"]

    with bench.moving(arm, sample):
        time.sleep(SETTLE_S)
        bench.count_kv(work, sample)
    return sample


@contextlib.contextmanager
def _engine(link: Link, folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    try:
        for rank, node in enumerate((SENDER, RECEIVER)):
            log = folder / f"rank{rank}.log"
            with log.open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        _command(link, rank, node),
                        env={**os.environ, **_environment(link, node)},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                )
        _wait(link, processes, folder / "rank0.log")
        yield
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait(10)


def _record(link: Link) -> ProcessRecord:
    """As the product starts a decode engine; but alone, so without its agent."""
    config = ClusterConfig(
        model="tiny",
        device="cpu",
        transfer="tcp",
        base_port=BASE_PORT,
        engine_args=("--tp-size", "2"),
    )
    hosts = {"d0": link.address(SENDER)}
    hardware = Hardware("cpu", "tcp", "the benchmark has no other")
    records = process_records(config, resolve_model("tiny"), hardware, hosts)
    return next(record for record in records if record.name == "d0")


def _command(link: Link, rank: int, node: str) -> list[str]:
    ends = ("--host", link.address(node), "--port", str(PORT), "--disaggregation-transfer-backend")
    nodes = ("--nnodes", "2", "--node-rank", str(rank))
    rendezvous = f"{link.address(SENDER)}:{RENDEZVOUS_PORT}"
    # SGLang's stand-in for a prefill engine does not go with it.
    argv = [word for word in _record(link).argv if not word.endswith("enable-radix-cache")]
    return [
        *within(link.network.namespace(node)),
        *_OWN_SHARED_MEMORY,
        *("taskset", "-c", str(INFERENCE_CORE), *argv),
        *(*ends, "fake", *nodes, "--dist-init-addr", rendezvous),
    ]


def _environment(link: Link, node: str) -> dict[str, str]:
    env = dict(_record(link).env)
    del env[EngineConfig.VARIABLE]
    core = str(INFERENCE_CORE)
    return env | {
        "SGLANG_HOST_IP": link.address(node),
        "SGLANG_CPU_OMP_THREADS_BIND": f"{core}|{core}",
        "GLOO_SOCKET_IFNAME": DEVICE,
    }


def _wait(link: Link, processes: list[subprocess.Popen[bytes]], log: Path) -> None:
    """Until rank 0 answers. Asked from the control namespace's side of the link."""
    end = time.monotonic() + START_S
    url = f"http://{link.address(SENDER)}:{PORT}/model_info"
    with link.network.entered():
        while time.monotonic() < end and all(process.poll() is None for process in processes):
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(url, timeout=2).close()
                return
            time.sleep(1)
    raise EngineFailed("\n".join(log.read_text(errors="replace").splitlines()[-25:]))
