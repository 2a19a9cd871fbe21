"""The arms, run in turn: inference's transfers with KV movement beside them, or elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from benchmarks.traffic.hosts import LINK_MBIT, RECEIVER, SENDER, Link, Worker, WorkerFailed

LINK_BYTES_PER_S = LINK_MBIT * 1e6 / 8
DEMAND = 0.6
"""Of the link, that inference asks for in the arms that are not floods."""
SETTLE_S = 1.2
"""From the start of KV movement until it is looked at: more than the pacer looks back."""
INFERENCE_CORE, KV_CORE = 0, 1


class Arm(msgspec.Struct, frozen=True):
    """``kv``: the link that KV movement takes, or "" for none."""

    name: str
    kv: str = "compute"
    has_classes: bool = False
    pace: str = "off"
    inference: str = "demand"
    """"demand" (DEMAND of the link and small messages), "flood" (all it can get), or ""."""


ARMS = (
    Arm("control", kv="storage", has_classes=True),
    Arm("classes", has_classes=True),
    Arm("kv alone", has_classes=True, inference=""),
    Arm("control, flood", kv="storage", has_classes=True, inference="flood"),
    Arm("classes, flood", has_classes=True, inference="flood"),
    Arm("control without classes", kv="storage"),
    Arm("pacer alone", pace="on"),
    Arm("neither", kv="compute"),
    Arm("pacer alone, flood", pace="on", inference="flood"),
    Arm("neither, flood", inference="flood"),
)


class Sample(msgspec.Struct):
    """One arm of one round. Rates are bytes of payload a second."""

    high_rate: float = 0.0
    message_p50_s: float = 0.0
    message_p99_s: float = 0.0
    messages: int = 0
    kv_rate: float = 0.0
    kv_failures: int = 0
    tpot_s: float = 0.0
    pacer: dict[str, float] = {}


class Bench:
    """The workers of all arms; one set, so that every arm has the same processes."""

    def __init__(self, link: Link) -> None:
        self._link = link
        link.set_classes(True)  # makes the group that the low class's sender starts in
        self._workers: list[Worker] = []
        try:
            self._start()
        except BaseException:  # those that have started must not stay behind
            self.close()
            raise

    def _start(self) -> None:
        self._sink = self._worker("sink", RECEIVER, INFERENCE_CORE)
        self._kv_sinks = {
            "compute": self._worker("sink", RECEIVER, KV_CORE),
            "storage": self._worker("sink", RECEIVER, KV_CORE, on_storage=True),
        }
        self._stream = self._worker("stream", SENDER, INFERENCE_CORE)
        self._messages = self._worker("messages", SENDER, INFERENCE_CORE)
        self._kv = self._worker("kv", SENDER, KV_CORE, low=True)

    def _worker(
        self, role: str, node: str, core: int, on_storage: bool = False, low: bool = False
    ) -> Worker:
        worker = self._link.start(role, node, core, on_storage, low)
        self._workers.append(worker)
        return worker

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def run(self, arm: Arm, seconds: float) -> Sample:
        """One arm, with what it measures."""
        sample = Sample()
        with self.moving(arm, sample):
            if arm.inference:
                self._inference(arm, seconds, sample)
            else:
                time.sleep(SETTLE_S)
                self.count_kv(lambda: time.sleep(seconds), sample)
        return sample

    @contextlib.contextmanager
    def moving(self, arm: Arm, sample: Sample) -> Iterator[None]:
        """The link as the arm wants it, with its KV movement. Raises :class:`WorkerFailed`
        afterwards if that was not moved."""
        self._link.set_classes(arm.has_classes)
        if arm.kv:
            target = self._kv_sinks[arm.kv].ready
            self._kv.ask("start", target=target, pace=arm.pace, nic_bytes_per_s=LINK_BYTES_PER_S)
        try:
            yield
        finally:
            if arm.kv:
                sample.pacer = self._kv.ask("stop")
        if sample.kv_failures:
            raise WorkerFailed(f"{sample.kv_failures} deliveries failed in the arm {arm.name}")

    def _inference(self, arm: Arm, seconds: float, sample: Sample) -> None:
        """Streams all the time, messages and counts once things have settled."""
        rate = DEMAND * LINK_BYTES_PER_S if arm.inference == "demand" else 0.0
        target = self._sink.ready
        self._stream.ask("run", target=target, seconds=SETTLE_S, rate=rate)
        self._stream.send("run", target=target, seconds=seconds, rate=rate)

        def work() -> None:
            if arm.inference == "demand":
                found = self._messages.ask("run", target=target, seconds=seconds - 0.1)
                latencies = np.array(found["latencies_s"])
                quantiles = np.quantile(latencies, [0.5, 0.99])
                sample.message_p50_s, sample.message_p99_s = quantiles.tolist()
                sample.messages = len(latencies)
            sample.high_rate = self._stream.answer()["bytes_per_s"]

        self.count_kv(work, sample)

    def count_kv(self, work: Callable[[], None], sample: Sample) -> None:
        """What KV movement does while ``work`` runs."""
        before = self._kv.ask("count")
        work()
        after = self._kv.ask("count")
        sample.kv_rate = (after["bytes"] - before["bytes"]) / (after["at"] - before["at"])
        sample.kv_failures = after["failures"] - before["failures"]


Rounds = dict[str, list[Sample]]
"""Of each arm, by its name."""


def measure(
    link: Link, rounds: int, seconds: float, step: Callable[[], object], found: Rounds
) -> None:
    """``rounds`` times all arms in turn, every second time backwards, into ``found``. Calls
    ``step`` after each."""
    bench = Bench(link)
    try:
        for number in range(rounds):
            for arm in ARMS if number % 2 == 0 else ARMS[::-1]:
                found.setdefault(arm.name, []).append(bench.run(arm, seconds))
                step()
    finally:
        bench.close()
