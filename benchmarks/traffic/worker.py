"""One process of the benchmark: ``python -m benchmarks.traffic.worker ROLE HOST CORE``.

A role answers each command, one line of JSON on stdin, with one line of JSON on stdout:

* ``sink``: memory that others write to; has no commands.
* ``stream``: inference's large transfers, at a rate or as fast as they go.
* ``messages``: inference's small ones, one at a time.
* ``client``: of an engine, to see how long a token takes.
* ``kv``: an agent's deliveries, by the product's own queue and pacer, from start to stop.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np

from common.block import BlockLayout
from common.ids import JobId, PlanId
from transfer.agent.jobs.transfer import Group, Transfer
from transfer.agent.jobs.transfer_queue import TransferQueue
from transfer.mooncake import TransferPeer
from transfer.pacing.agent_pacing import AgentPacing, PaceSettings, pacer_samples
from transfer.pacing.pacer import read_pace
from transfer.pacing.peer_nics import PeerNics

SINK_BYTES = 64 << 20
STREAM_BYTES = 256 << 10
"""Of one transfer: a layer of some pages."""
MESSAGE_BYTES = 4 << 10
MESSAGE_PERIOD_S = 0.01
PAGES, PAGE_BYTES, LAYERS = 8, 64 << 10, 8
JOBS = 4
"""Deliveries that are always open."""
JOB_DEADLINE_S = 60.0
QUEUE_STOP_S = 15.0
REQUEST_S = 60.0


class Target:
    """Where to write: what a sink has said of itself."""

    def __init__(self, command: dict[str, Any]) -> None:
        self.session_id: str = command["session_id"]
        self.address = np.array([command["address"]], np.int64)


class Source:
    """A peer with memory to write from."""

    def __init__(self, host: str, nbytes: int) -> None:
        self.peer = TransferPeer(host, "tcp")
        self.memory = np.ones(nbytes, np.uint8)
        self.address = np.array([self.memory.ctypes.data], np.int64)
        self.peer.register(int(self.address[0]), nbytes)

    def write(self, target: Target, nbytes: int) -> None:
        length = np.array([nbytes], np.int64)
        self.peer.write(target.session_id, self.address, target.address, length)


class Sink(Source):
    def __init__(self, host: str) -> None:
        super().__init__(host, SINK_BYTES)

    def ready(self) -> dict[str, Any]:
        return {"session_id": self.peer.session_id, "address": int(self.address[0])}


class Stream(Source):
    def __init__(self, host: str) -> None:
        super().__init__(host, STREAM_BYTES)

    def run(self, target: Target, seconds: float, rate: float) -> dict[str, Any]:
        """``rate``: bytes a second to ask for; 0: no end of them. What comes late is caught up
        with, as work that waits for it would."""
        began = time.monotonic()
        for sent in itertools.count():
            due = began + sent * STREAM_BYTES / rate if rate else began
            time.sleep(max(0.0, due - time.monotonic()))
            if (now := time.monotonic()) - began >= seconds:
                return {"bytes_per_s": sent * STREAM_BYTES / (now - began)}
            self.write(target, STREAM_BYTES)
        raise AssertionError("count() has no end")


class Messages(Source):
    def __init__(self, host: str) -> None:
        super().__init__(host, MESSAGE_BYTES)

    def run(self, target: Target, seconds: float) -> dict[str, Any]:
        took_s, end = [], time.monotonic() + seconds
        while (began := time.monotonic()) < end:
            self.write(target, MESSAGE_BYTES)
            took_s.append(time.monotonic() - began)
            time.sleep(max(0.0, MESSAGE_PERIOD_S - took_s[-1]))
        return {"latencies_s": took_s}


class KvMovement(Source):
    """Deliveries one after the other, JOBS of them always open."""

    def __init__(self, host: str) -> None:
        super().__init__(host, PAGES * PAGE_BYTES * LAYERS)
        self._layout = BlockLayout(1, LAYERS, (PAGE_BYTES,))
        self._nics = PeerNics(self.peer.is_local, is_rdma=False)
        self._numbers = itertools.count(1)
        self._failures = 0
        self._transfers: dict[int, Transfer] = {}
        self._pacing = AgentPacing(PaceSettings("off"), self._nics, self._needed_rate)
        # One for all arms: what it registers with Mooncake is never given back.
        self._queue = TransferQueue(
            self.peer,
            "kv",
            threads=4,
            transfers_max=2 * JOBS,
            post=lambda call: call(),
            pacer_towards=lambda session_id: self._pacing.pacer_towards(session_id),
        )

    def start(self, target: Target, pace: str, nic_bytes_per_s: float) -> dict[str, Any]:
        self._target, self._is_on = target, True
        settings = PaceSettings(read_pace(pace), nic_bytes_per_s)
        self._pacing = AgentPacing(settings, self._nics, self._needed_rate)
        for _ in range(JOBS):
            self._submit()
        return {}

    def count(self) -> dict[str, Any]:
        moved = sum(self.peer.moved_bytes().values())
        nic = self._nics.nic_towards(self._target.session_id)
        return {"bytes": moved, "at": time.monotonic(), "failures": self._failures, "nic": nic}

    def stop(self) -> dict[str, Any]:
        self._is_on = False
        for transfer in list(self._transfers.values()):
            self._queue.cancel(transfer)
        end = time.monotonic() + QUEUE_STOP_S
        while len(self._queue) and time.monotonic() < end:
            time.sleep(0.01)
        return {s.spelled: s.value for s in pacer_samples(self._pacing.pacers())}

    def _needed_rate(self, now: float, counts: Callable[[str], bool]) -> float:
        return self._queue.needed_rate(now, counts)

    def _submit(self) -> None:
        pages = np.arange(PAGES, dtype=np.int64)
        layer_bytes = PAGES * PAGE_BYTES
        buffers = int(self._target.address[0]) + np.arange(LAYERS)[:, None] * layer_bytes
        number = next(self._numbers)
        transfer = Transfer(
            job=JobId(number),
            session_id=self._target.session_id,
            groups=[
                Group(self._layout, buffers, self.address[0] + pages * PAGE_BYTES * LAYERS, pages)
            ],
            deadline=time.monotonic() + JOB_DEADLINE_S,
            ended=lambda error: self._ended(number, error),
            plan=PlanId(number),
        )
        self._transfers[number] = transfer
        self._queue.submit(transfer)

    def _ended(self, number: int, error: Exception | None) -> None:
        del self._transfers[number]
        if self._is_on:
            self._failures += error is not None
            self._submit()


class Client:
    """Asks the engine on its own host for tokens, one request at a time."""

    def __init__(self, host: str) -> None:
        self._host = host

    def run(self, port: int, prompt_tokens: int, tokens: int) -> dict[str, Any]:
        """TPOT of one request: from its first token to its last."""
        body = {
            "input_ids": [7 + n % 50 for n in range(prompt_tokens)],
            "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0},
            "stream": True,
            # SGLang's own stand-in for a prefill engine: its KV is not that of the prompt.
            "bootstrap_host": "2.2.2.2",
            "bootstrap_room": 0,
        }
        request = urllib.request.Request(
            f"http://{self._host}:{port}/generate",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        came: list[tuple[float, int]] = []
        with urllib.request.urlopen(request, timeout=REQUEST_S) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    done = json.loads(line[6:])["meta_info"]["completion_tokens"]
                    came.append((time.monotonic(), done))
        (first_at, first), (last_at, last) = came[0], came[-1]
        return {"tpot_s": (last_at - first_at) / (last - first), "tokens": last}


ROLES = {"client": Client, "sink": Sink, "stream": Stream, "messages": Messages, "kv": KvMovement}


def serve(worker: Any) -> None:
    """Answer commands until stdin ends."""
    say(worker.ready() if isinstance(worker, Sink) else {})
    for line in sys.stdin:
        command = json.loads(line)
        call = getattr(worker, command.pop("call"))
        if "target" in command:
            command["target"] = Target(command["target"])
        say(call(**command))


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def main() -> None:
    role, host, core = sys.argv[1:]
    os.sched_setaffinity(0, {int(core) % (os.cpu_count() or 1)})
    serve(ROLES[role](host))
    os._exit(0)  # Mooncake's threads are not waited for


if __name__ == "__main__":
    main()
