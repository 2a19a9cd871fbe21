"""Prometheus metrics of the gateway, and those that agents and engines report to it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from launch.control_plane import ControlPlane
from launch.trace import Trace

_SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_TTFT_BUCKETS_S = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 120)


class GatewayMetrics:
    """One registry for one app; ``plane`` supplies what other processes count."""

    def __init__(self, plane: ControlPlane) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "Client requests.", "endpoint", "outcome")
        self.retries = self._counter("retries", "Attempts after a failed one.")
        self._hit_tokens = self._counter("hit_tokens", "Prompt tokens whose KV was in DRAM.")
        self._recomputed = self._counter("recomputed_tokens", "Prompt tokens without such KV.")
        self._reads = self._counter("planned_read_bytes", "Read for plans.", "agent", "tier")
        self.in_flight = Gauge(
            "dualpath:requests_in_flight", "Admitted parts of requests.", registry=self._registry
        )
        self.queued = Gauge(
            "dualpath:requests_queued", "Waiting for an engine.", registry=self._registry
        )
        self._ttft = Histogram(
            "dualpath:time_to_first_token_seconds",
            "From arrival to the first token (not streamed: to P's answer).",
            buckets=_TTFT_BUCKETS_S,
            registry=self._registry,
        )
        self._registry.register(_Reported(plane))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"dualpath:{name}", text, labels, registry=self._registry)

    def served(self, trace: Trace, page_tokens: int, first_token_s: float) -> None:
        """Count what a request that was answered hit and read, and its first token's time."""
        self._ttft.observe(first_token_s)
        self._hit_tokens.inc(trace.hit_blocks * page_tokens)
        self._recomputed.inc(trace.recomputed_tokens)
        for agent, reader in trace.readers.items():
            for tier, read_bytes in reader.read_bytes.items():
                self._reads.labels(agent, tier.value).inc(read_bytes)

    def text(self) -> bytes:
        return generate_latest(self._registry)


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
