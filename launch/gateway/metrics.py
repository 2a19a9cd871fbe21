"""Prometheus metrics of the gateway, and those that agents and engines report to it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from launch.gateway.admission import Admission
from launch.gateway.control.control_plane import ControlPlane
from launch.gateway.request.trace import Trace
from scheduler.scheduler import Scheduler

_SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_TTFT_BUCKETS_S = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 120)
_QUEUE_BUCKETS_S = (0.001, 0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
_RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 4, 10)
_ESTIMATE_MIN_S = 0.001
"""Of shorter estimates the error says nothing."""


class GatewayMetrics:
    """One registry for one app; ``plane`` supplies what other processes count."""

    def __init__(self, plane: ControlPlane, admission: Admission) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "Client requests.", "endpoint", "outcome")
        self.retries = self._counter("retries", "Attempts after a failed one.")
        self._hit_tokens = self._counter("hit_tokens", "Prompt tokens whose KV was in DRAM.")
        self._recomputed = self._counter("recomputed_tokens", "Prompt tokens without such KV.")
        self._reads = self._counter("planned_read_bytes", "Read for plans.", "agent", "tier")
        self.queue_time = self._histogram(
            "queue_time_seconds", "Wait for an engine, of each attempt.", _QUEUE_BUCKETS_S
        )
        self._ttft = self._histogram(
            "time_to_first_token_seconds",
            "From arrival to the first token (not streamed: to P's answer).",
            _TTFT_BUCKETS_S,
        )
        self._read_ratio = self._histogram(
            "read_time_ratio",
            "Time until a plan's reads were done, measured / estimated.",
            _RATIO_BUCKETS,
        )
        self._load_ratio = self._histogram(
            "first_token_time_ratio",
            "Time from the plan to the first token, measured / what the choice to load or to "
            "recompute was made by.",
            _RATIO_BUCKETS,
        )
        self._registry.register(_Reported(plane))
        self._registry.register(_Decided(plane.scheduler, admission))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"dualpath:{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"dualpath:{name}", text, buckets=buckets, registry=self._registry)

    def served(self, trace: Trace, page_tokens: int, first_token_s: float) -> None:
        """Count what a request that was answered hit and read, and its first token's time."""
        self._ttft.observe(first_token_s)
        self._hit_tokens.inc(trace.hit_blocks * page_tokens)
        self._recomputed.inc(trace.recomputed_tokens)
        for agent, reader in trace.readers.items():
            for tier, read_bytes in reader.read_bytes.items():
                self._reads.labels(agent, tier.value).inc(read_bytes)
        if trace.attempts == 1:
            self._estimated(trace, first_token_s)

    def _estimated(self, trace: Trace, first_token_s: float) -> None:
        timings_s, estimates_s = trace.timings_s, trace.estimates_s
        before_plan_s = timings_s.get("tokenize", 0.0) + timings_s["queue"]
        for name, measured_s, ratio in (
            ("read", timings_s["read"], self._read_ratio),
            ("first_token", first_token_s - before_plan_s, self._load_ratio),
        ):
            if estimates_s.get(name, 0.0) >= _ESTIMATE_MIN_S:
                ratio.observe(measured_s / estimates_s[name])

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Decided(Collector):
    """What the scheduler and the admission of requests go by."""

    def __init__(self, scheduler: Scheduler, admission: Admission) -> None:
        self._scheduler = scheduler
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        yield _single("requests_in_flight", "Admitted parts of requests.", self._admission.admitted)
        yield _single("requests_queued", "Waiting for an engine.", self._admission.queued)
        yield _single("tenants_queued", "Whose requests wait.", self._admission.tenants_queued)
        yield _single(
            "requests_displaced",
            "Turned away while queued, for a tenant that held less.",
            self._admission.displaced_total,
            "counter",
        )
        draining = Metric("dualpath:peer_draining", "Whether it gets nothing new.", "gauge")
        backlog = Metric(
            "dualpath:read_backlog_seconds",
            "Bytes promised and not yet read, at the rate reckoned with.",
            "gauge",
        )
        view = self._scheduler.cluster(time.monotonic())
        for kind, peers in (("engine", view["engines"]), ("agent", view["agents"])):
            for peer in peers:
                draining.add_sample(draining.name, {kind: peer["name"]}, float(peer["draining"]))
        for agent in view["agents"]:
            backlog.add_sample(backlog.name, {"agent": agent["name"]}, agent["backlog_s"])
        yield draining
        yield backlog


def _single(name: str, text: str, value: float, kind: str = "gauge") -> Metric:
    metric = Metric(f"dualpath:{name}", text, kind)
    metric.add_sample(metric.name + ("_total" if kind == "counter" else ""), {}, value)
    return metric


class _Reported(Collector):
    """Liveness of every peer, and the counters of its last report with its name as a label."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    def collect(self) -> Iterator[Metric]:
        up = Metric("dualpath:peer_up", "Whether the process gives signs of life.", "gauge")
        malformed = Metric(
            "dualpath:malformed_messages", "Dropped messages from the process.", "counter"
        )
        families: dict[str, Metric] = {}
        for peer in self._plane.peers():
            label = {peer.kind: peer.name}
            up.add_sample(up.name, label, float(self._plane.alive(peer)))
            malformed.add_sample(f"{malformed.name}_total", label, peer.malformed_total)
            for sample, value in peer.counters().items():
                _add(families, sample, label, value)
        yield up
        yield malformed
        yield from families.values()


def _add(families: dict[str, Metric], sample: str, label: dict[str, str], value: float) -> None:
    match = _SAMPLE.fullmatch(sample)
    if match is None:
        return
    name = match["name"]
    kind = "counter" if name.endswith("_total") else "gauge"
    family = name.removesuffix("_total")
    if name not in families:
        families[name] = Metric(family, "Reported by agents or engines.", kind)
    labels = dict(_LABEL.findall(match["labels"] or ""))
    families[name].add_sample(name, {**labels, **label}, value)
