"""A real cluster for tests: ``launch.cluster`` as a subprocess, and a client of its API."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import benchmarks.plain_sglang
from launch.models.resolve import resolve_model
from tests.common.ports import place_of_worker

START_TIMEOUT_S = 240
STOP_TIMEOUT_S = 15


class RequestFailed(Exception):
    """An HTTP answer other than 2xx."""

    def __init__(self, status: int, body: str, headers: dict[str, str]) -> None:
        super().__init__(f"HTTP {status}: {body[:500]}")
        self.status, self.body, self.headers = status, body, headers


@dataclass
class Answer:
    """What a request gave: its JSON and the trace in its header."""

    body: Any
    trace: dict[str, Any]

    @property
    def output_ids(self) -> list[int]:
        return self.body["output_ids"]

    @property
    def cached_tokens(self) -> int:
        return self.body["meta_info"]["cached_tokens"]

    @property
    def reader_agents(self) -> set[str]:
        return {agent for agent, share in self.trace["readers"].items() if share["blocks"]}

    def read_bytes(self, tier: str) -> int:
        return sum(share["read_bytes"].get(tier, 0) for share in self.trace["readers"].values())


def post(
    url: str, body: Any, timeout_s: float = 120, headers: dict[str, str] | None = None
) -> Answer:
    """POST JSON; raises :class:`RequestFailed`."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            text = response.read().decode()
            trace = json.loads(response.headers.get("x-dualpath-trace") or "{}")
            return Answer(json.loads(text) if text[:1] in "[{" else text, trace)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        raise RequestFailed(error.code, text, dict(error.headers)) from None


def get(url: str, timeout_s: float = 10) -> tuple[int, str]:
    """GET: status and text."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


_PORTS_END = 32000
_PROCESSES_MAX = 4


def free_port_block(size: int, lowest: int = 17500) -> int:
    """First of ``size`` consecutive ports that are free now."""
    # Below the ports of outgoing connections, where Mooncake refuses a fixed range. No other test
    # process of this run looks there: what is to be bound in a while is still free now.
    own = range(lowest, _PORTS_END, size)[place_of_worker() % _PROCESSES_MAX :: _PROCESSES_MAX]
    begin = os.getpid() % min(20, len(own))
    for first in (*own[begin:], *own[:begin]):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + size):
                    probe = stack.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise RuntimeError("no free block of ports")


def prompt(length: int, seed: int) -> list[int]:
    """Token ids; the same for the same seed."""
    return random.Random(seed).choices(range(300, 2000), k=length)


GREEDY = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}


@dataclass
class Cluster:
    """Handle of a running cluster."""

    process: subprocess.Popen[bytes]
    url: str
    log_dir: Path
    flags: list[str] = field(default_factory=list)

    def generate(
        self,
        input_ids: list[int],
        timeout_s: float = 120,
        headers: dict[str, str] | None = None,
        **fields: Any,
    ) -> Answer:
        """One ``/generate`` with token ids; greedy unless told otherwise."""
        params = {**GREEDY, **fields.pop("sampling_params", {})}
        body = {"input_ids": input_ids, "sampling_params": params, **fields}
        return post(f"{self.url}/generate", body, timeout_s, headers)

    def set_policy(self, name: str) -> None:
        post(f"{self.url}/admin/policy", {"path_policy": name})

    def flush_engines(self) -> None:
        """Empty the engines' own caches (and poison them): only the store keeps blocks."""
        deadline = time.monotonic() + 90  # one may just be starting again
        while True:
            try:
                post(f"{self.url}/flush_cache", {})
                return
            except RequestFailed:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def incarnations(self, kind: str) -> dict[str, int]:
        """Incarnation of each live agent or engine that the gateway knows."""
        return {p["name"]: p["incarnation"] for p in self.state()[kind] if p["alive"]}

    def restart_agents(self) -> None:
        """kill -9 of all agents, until they are back: DRAM is gone, SSD and remote stay."""
        before = {agent["name"]: agent["incarnation"] for agent in self.state()["agents"]}
        for name in before:
            self.signal(name, signal.SIGKILL)
        self.wait_restarted(before)

    def wait_restarted(self, agents: dict[str, int]) -> None:
        """Until agents that were killed, with these incarnations, are back and of use."""

        def back() -> bool:
            now = self.incarnations("agents")
            return all(now.get(name, 0) > before for name, before in agents.items())

        self.wait_until(back, 30, "agents restarted")
        time.sleep(2)  # engines register with the new agents, which announce what they hold

    def state(self) -> dict[str, Any]:
        """What the scheduler sees: ``/admin/cluster``."""
        return json.loads(get(f"{self.url}/admin/cluster")[1])

    def metrics(self) -> dict[str, float]:
        """Every sample of ``/metrics``, by name with labels."""
        samples = {}
        for line in get(f"{self.url}/metrics")[1].splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                samples[name] = float(value)
        return samples

    def metric_sum(self, part: str) -> float:
        """Sum of all samples whose name contains ``part``."""
        return sum(value for name, value in self.metrics().items() if part in name)

    def pids(self, marker: str) -> list[int]:
        """Processes of this cluster whose settings or command line contain ``marker``."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                names = [child.environ().get(v, "") for v in ("DUALPATH_AGENT", "DUALPATH_ENGINE")]
                own = [json.loads(text)["name"] for text in names if text]
                if marker in own or marker in " ".join(child.cmdline()):
                    found.append(child.pid)
        return found

    def signal(self, name: str, number: signal.Signals) -> list[int]:
        """Send a signal to every process of one agent, engine or the gateway."""
        pids = self.pids(name)
        assert pids, f"no process of {name}"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return pids

    def wait_healthy(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until ``/health`` is 200."""
        self.wait_until(lambda: get(f"{self.url}/health")[0] == 200, timeout_s, "health")

    def wait_complete(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until the gateway has heard from every agent and engine of the layout: ``/health`` is
        200 when it knows one prefill and one decode engine."""

        def complete() -> bool:
            if get(f"{self.url}/health")[0] != 200:  # quickly said, and for most of the start
                return False
            up = [value for name, value in self.metrics().items() if "peer_up{" in name]
            known = self.incarnations("agents").keys() | self.incarnations("engines").keys()
            return 0 < len(up) == sum(up) == len(known)

        self.wait_until(complete, timeout_s, "every agent and engine is known")

    def wait_unharmed(self, engines: dict[str, int]) -> None:
        """Until the gateway hears from all these incarnations of engines: on a busy machine one
        can be late with a sign of life. One that had to be started anew never comes."""

        def unharmed() -> bool:
            return self.incarnations("engines") == engines

        self.wait_until(unharmed, 20, f"the engines are still {engines}")

    def wait_until(self, holds: Any, timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError, RequestFailed):
                if holds():
                    return
            if self.process.poll() is not None:
                raise RuntimeError(f"cluster ended with {self.process.returncode}:\n{self.log()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} not within {timeout_s} s:\n{self.log()}")
            time.sleep(0.1)

    def wait_stored(self) -> None:
        """Until every block offered by the engines is with the agents and durable, and the
        directory knows: by reports that each process made later."""
        time.sleep(0.1)  # the end of a request is offered after its answer has left
        self.wait_reported("engines", none_of="dualpath:engine_open_jobs")
        self.wait_reported("agents", none_of="dualpath:agent_persisting_blocks")
        time.sleep(0.1)  # an announcement may leave a little after such a report

    def wait_reported(self, kind: str, none_of: str = "") -> None:
        """Until every living one has reported since, and that it has none of something."""
        begun = time.monotonic()

        def reported() -> bool:
            living = self.incarnations(kind).keys()
            heard = self.heard_since(begun, kind)
            if not heard or heard != living:
                return False
            return not none_of or self.metric_sum(none_of) == 0

        self.wait_until(reported, 30, f"{kind} report {none_of and 'no ' + none_of}")

    def heard_since(self, begun_s: float, kind: str) -> set[str]:
        """Living agents or engines that have reported after a monotonic time."""
        looked_s = time.monotonic()
        living = [p for p in self.state()[kind] if p["alive"]]
        return {p["name"] for p in living if looked_s - p["last_seen_s"] > begun_s}

    def log(self) -> str:
        """Ends of all log files, for a failed test."""
        parts = []
        for path in sorted(self.log_dir.glob("*.log")):
            parts.append(f"==== {path.name}\n" + "\n".join(path.read_text().splitlines()[-25:]))
        return "\n".join(parts)

    def stop(self) -> float:
        """SIGTERM; returns the seconds it took."""
        started = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(STOP_TIMEOUT_S)
        return time.monotonic() - started


@contextlib.contextmanager
def running_cluster(folder: Path, *flags: str) -> Iterator[Cluster]:
    """A cluster on free ports with its store and logs under ``folder``; all of it is known to
    the gateway."""
    port = free_port_block(500)
    log_dir = folder / "logs"
    argv = [sys.executable, "-m", "launch.cluster", "--port", str(port)]
    argv += ["--base-port", str(port + 10), "--log-dir", str(log_dir)]
    argv += ["--restart-backoff-max-s", "1"]
    argv += [] if "--ssd-dir" in flags else ["--ssd-dir", str(folder / "ssd")]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "cluster.out").open("wb") as output:
        process = subprocess.Popen([*argv, *flags], stdout=output, stderr=output)
    cluster = Cluster(process, f"http://127.0.0.1:{port}", log_dir, list(flags))
    try:
        cluster.wait_complete()
        yield cluster
    finally:
        try:
            cluster.stop()
        finally:
            if process.poll() is None:
                process.kill()


def plain_sglang(
    model: Path, folder: Path, *flags: str
) -> AbstractContextManager[Callable[[], str]]:
    """The reference for token identity."""
    port = free_port_block(50, lowest=12000)  # apart from those of a cluster that starts too
    return benchmarks.plain_sglang.plain_sglang(model, port, folder / "plain.log", *flags)


class PlainTokens:
    """Tokens of ordinary SGLang with the model ``tiny``, greedy unless told otherwise, and
    remembered. It may still be starting: a cluster can be started meanwhile."""

    def __init__(self, served: Callable[[], str]) -> None:
        self._served = served
        self._known: dict[str, list[int]] = {}

    def __call__(self, input_ids: list[int], **params: Any) -> list[int]:
        sampling = {**GREEDY, **params}
        name = repr((input_ids, sorted(sampling.items())))
        if name not in self._known:
            body = {"input_ids": input_ids, "sampling_params": sampling}
            self._known[name] = self._post("generate", body).body["output_ids"]
        return self._known[name]

    def of_weights(self, model: Path, input_ids: list[int]) -> list[int]:
        """Greedy tokens with the weights of this folder, which are those of this request alone."""
        try:
            self._take_weights(model)
            body = {"input_ids": input_ids, "sampling_params": GREEDY}
            return self._post("generate", body).body["output_ids"]
        finally:
            self._take_weights(resolve_model("tiny"))

    @contextlib.contextmanager
    def lent(self) -> Iterator[str]:
        """Its URL, for a test that changes its weights; afterwards it has its own again."""
        yield self._served()
        self._take_weights(resolve_model("tiny"))

    def _take_weights(self, model: Path) -> None:
        # What it has cached goes with the weights.
        assert self._post("update_weights_from_disk", {"model_path": str(model)}).body["success"]

    def _post(self, route: str, body: dict[str, Any]) -> Answer:
        return post(f"{self._served()}/{route}", body)


@contextlib.contextmanager
def plain_tokens(folder: Path, *flags: str) -> Iterator[PlainTokens]:
    """Of a process of its own."""
    with plain_sglang(resolve_model("tiny"), folder, *flags) as served:
        yield PlainTokens(served)


_of_this_run = contextlib.ExitStack()
atexit.register(_of_this_run.close)


@functools.cache
def shared_plain(*flags: str) -> PlainTokens:
    """Of one process for all tests that ask with the same flags: it ends with the run."""
    folder = _of_this_run.enter_context(tempfile.TemporaryDirectory(prefix="plain-sglang-"))
    return _of_this_run.enter_context(plain_tokens(Path(folder), *flags))
