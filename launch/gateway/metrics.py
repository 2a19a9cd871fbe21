"""Prometheus metrics of the gateway, and those that agents and engines report to it."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter as Tally
from collections.abc import Iterator
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from common.cluster.membership import Role
from common.metrics import METRICS, PREFIX
from common.samples import Latencies
from launch.gateway.admission import Admission
from launch.gateway.errors import Conflict
from launch.gateway.outage import Outage
from launch.gateway.peers.control_plane import ControlPlane
from launch.gateway.peers.membership import Membership
from launch.gateway.registry.counts import Change
from launch.gateway.registry.registry import Registry
from launch.gateway.request.trace import Trace

log = logging.getLogger(__name__)

_ESTIMATE_MIN_S = 0.001
"""Of shorter estimates the error says nothing."""


class GatewayMetrics:
    """One registry for one app; ``plane`` supplies what other processes count."""

    def __init__(
        self, plane: ControlPlane, registry: Registry, admission: Admission, outage: Outage
    ) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests_total")
        self.refused = self._counter("refused_total")
        self.retries = self._counter("retries_total")
        self._hit_tokens = self._counter("hit_tokens_total")
        self._recomputed = self._counter("recomputed_tokens_total")
        self._lacking = self._counter("lacking_tokens_total")
        self._reads = self._counter("planned_read_bytes_total")
        self.queue_time = self._histogram("queue_time_seconds")
        self._ttft = self._histogram("time_to_first_token_seconds")
        self._read_ratio = self._histogram("read_time_ratio")
        self._load_ratio = self._histogram("first_token_time_ratio")
        self._registry.register(_Reported(plane.members))
        self._registry.register(_Nodes(registry))
        self._registry.register(_Decided(plane, admission, outage))

    def _counter(self, name: str) -> Counter:
        metric = METRICS[name]
        return Counter(PREFIX + name, metric.help, metric.labels, registry=self._registry)

    def _histogram(self, name: str) -> Histogram:
        metric = METRICS[name]
        return Histogram(
            PREFIX + name, metric.help, buckets=metric.buckets, registry=self._registry
        )

    def served(self, trace: Trace, page_tokens: int, first_token_s: float) -> None:
        """Count what a request that was answered hit and read, and its first token's time."""
        self._ttft.observe(first_token_s)
        self._hit_tokens.inc(trace.hit_blocks * page_tokens)
        self._recomputed.inc(trace.recomputed_tokens)
        for part, blocks in trace.lacking.items():
            self._lacking.labels(part).inc(blocks * page_tokens)
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

    def ended(self) -> dict[str, int]:
        """Client requests by outcome, of all endpoints."""
        ended: Tally[str] = Tally()
        for family in self.requests.collect():
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    ended[sample.labels["outcome"]] += int(sample.value)
        return ended

    def tokens(self) -> dict[str, int]:
        """Prompt tokens of answered requests, hit and recomputed."""
        return {"hit": _value(self._hit_tokens), "recomputed": _value(self._recomputed)}

    def text(self) -> bytes:
        return generate_latest(self._registry)


def _value(counter: Counter) -> int:
    """Of one without labels."""
    [family] = counter.collect()
    return next(int(s.value) for s in family.samples if s.name.endswith("_total"))


class _Decided(Collector):
    """What the scheduler and the admission of requests go by."""

    def __init__(self, plane: ControlPlane, admission: Admission, outage: Outage) -> None:
        self._scheduler = plane.scheduler
        self._leadership = plane.leadership
        self._outage = outage
        self._admission = admission

    def collect(self) -> Iterator[_Family]:
        for name, value in (
            ("gateway_active", self._leadership.is_active),
            ("gateway_term", self._leadership.term),
            ("gateway_takeovers_total", self._leadership.takeovers_total),
            ("requests_in_flight", self._admission.admitted),
            ("requests_queued", self._admission.queued),
            ("requests_without_engine", self._outage.waiting),
            ("tenants_queued", self._admission.tenants_queued),
            ("requests_displaced_total", self._admission.displaced_total),
        ):
            family = _Family(name)
            family.add({}, value)
            yield family
        draining, backlog = _Family("peer_draining"), _Family("read_backlog_seconds")
        view = self._scheduler.cluster(time.monotonic())
        for kind, peers in (("engine", view["engines"]), ("agent", view["agents"])):
            for peer in peers:
                draining.add({kind: peer["name"]}, float(peer["draining"]))
        for agent in view["agents"]:
            backlog.add({"agent": agent["name"]}, agent["backlog_s"])
        yield draining
        yield backlog


class _Nodes(Collector):
    """Those that have joined, and those that came and went."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[_Family]:
        nodes, ages = _Family("nodes"), _Family("node_lease_age_seconds")
        changes, refusals = _Family("node_changes_total"), _Family("node_refusals_total")
        known, counts = list(self._registry.nodes.values()), self._registry.counts
        there = Tally((node.role, node.condition) for node in known)
        for role in Role:
            for condition in ("serving", "draining", "gone"):
                nodes.add({"role": role.value, "state": condition}, there[role, condition])
            for change in Change:
                labels = {"role": role.value, "change": change.value}
                changes.add(labels, counts.changes[role, change])
        for reason in Conflict.Reason:
            refusals.add({"reason": reason.value}, counts.refusals[reason])
        for node in known:
            ages.add({"node": node.name}, node.silent_s(time.monotonic()))
        yield from (nodes, ages, changes, refusals)


class _Reported(Collector):
    """Liveness of every peer, and the samples of its last report with its name as a label."""

    def __init__(self, members: Membership) -> None:
        self._members = members

    def collect(self) -> Iterator[_Family]:
        up, malformed = _Family("peer_up"), _Family("malformed_messages_total")
        reported: dict[str, _Family] = {}
        for peer in self._members.peers():
            own = {peer.kind: peer.name}
            up.add(own, float(self._members.alive(peer)))
            malformed.add(own, peer.malformed_total)
            for sample in peer.samples():
                metric = sample.declared()
                if metric is None:
                    _complain(peer.name, sample.metric)
                    continue
                if metric.name not in reported:
                    reported[metric.name] = _Family(metric.name)
                labels = dict(zip(metric.labels, sample.labels, strict=True))
                reported[metric.name].add(labels | own, sample.value)
        yield from (up, malformed, *reported.values())


@cache
def _complain(peer: str, name: str) -> None:
    """Once: Prometheus asks every few seconds."""
    log.warning("left out of the metrics, as not declared here: %s of peer=%s", name, peer)


class _Family(Family):
    """All samples of one declared metric; a histogram's stay one."""

    def __init__(self, name: str) -> None:
        metric = METRICS[name]
        super().__init__(PREFIX + name.removesuffix("_total"), metric.help, metric.kind.value)
        self._spelling = PREFIX + name

    def add(self, labels: dict[str, str], value: float | Latencies) -> None:
        if not isinstance(value, Latencies):
            self.add_sample(self._spelling, labels, value)
            return
        for bound, seen in value.cumulative():
            le = f"{bound:g}" if bound < math.inf else "+Inf"
            self.add_sample(f"{self._spelling}_bucket", labels | {"le": le}, seen)
        self.add_sample(f"{self._spelling}_count", labels, value.count)
        self.add_sample(f"{self._spelling}_sum", labels, value.sum_s)
