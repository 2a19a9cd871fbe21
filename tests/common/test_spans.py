"""Spans: what leaves a process, and what never holds one up."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from common.tracing import otlp
from common.tracing.otlp import CollectorTracer
from common.tracing.spans import NO_SPAN, Tracer, make_tracer, missing_packages
from tests.common.collector import CLIENT, NOT_SAMPLED, TRACE, TRACEPARENT, running_collector

ROOT = Path(__file__).parents[2]
DEAD = "127.0.0.1:9"
"""Nobody listens there."""


def test_a_request_is_one_tree_over_processes():
    with running_collector() as collector:
        gateway = make_tracer(collector.endpoint, "gateway", "g")
        agent = make_tracer(collector.endpoint, "agent", "a")
        request = gateway.request("POST /x", {"traceparent": TRACEPARENT, "tracestate": "a=b"})
        attempt = request.child("attempt")
        assert attempt.headers["tracestate"] == "a=b"
        begun_s = time.monotonic() - 2
        agent.follow(attempt.traceparent).note("read", begun_s, {"bytes": 7, "tier": ["ssd"]})
        attempt.note("queue", time.monotonic(), error="lost")
        attempt.set({"plan": 3})
        attempt.end("ok")
        request.end("failed", is_error=True)
        request.end("ok")  # says nothing new
        gateway.close()
        agent.close()
        spans = {span.name: span for span in collector.wait(lambda span: True, 4)}
    assert {span.trace for span in spans.values()} == {TRACE}
    assert spans["POST /x"].parent == CLIENT
    assert spans["attempt"].parent == spans["POST /x"].id
    assert spans["read"].parent == spans["queue"].parent == spans["attempt"].id
    assert [(spans[n].service, spans[n].process) for n in ("attempt", "read")] == [
        ("gateway", "g"),
        ("agent", "a"),
    ]
    assert spans["read"].attributes == {"dualpath.bytes": 7, "dualpath.tier": ["ssd"]}
    assert spans["read"].ended_ns - spans["read"].begun_ns >= 2e9
    assert spans["attempt"].attributes == {"dualpath.plan": 3, "dualpath.outcome": "ok"}
    assert (spans["POST /x"].outcome, spans["POST /x"].is_error) == ("failed", True)
    assert spans["queue"].is_error and not spans["read"].is_error


def test_what_the_client_does_not_sample_is_not_sent_and_engines_hear_that():
    with running_collector() as collector:
        tracer = make_tracer(collector.endpoint, "gateway", "g")
        unwanted = tracer.request("unwanted", {"traceparent": NOT_SAMPLED})
        assert unwanted.child("attempt").traceparent.endswith("-00")
        assert tracer.follow(unwanted.traceparent) is NO_SPAN
        unwanted.note("queue", time.monotonic())
        unwanted.end("ok")
        tracer.request("wanted", {}).end("ok")
        tracer.request("strange", {"traceparent": "no such thing"}).end("ok")
        tracer.close()
        collector.named("strange")
        assert {span.name for span in collector.spans} == {"wanted", "strange"}
        assert all(span.parent == "" for span in collector.spans)


@pytest.fixture(params=["nobody listens", "nobody answers"])
def dead_endpoint(request):
    if request.param == "nobody listens":
        yield DEAD
        return
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield f"127.0.0.1:{silent.getsockname()[1]}"


def test_a_dead_collector_costs_spans_and_nothing_else(dead_endpoint, monkeypatch):
    monkeypatch.setattr(otlp, "QUEUE_SPANS", 600)
    tracer = CollectorTracer(dead_endpoint, "gateway", "g")
    processor: Any = tracer._provider._active_span_processor._span_processors[0]
    queue = processor._batch_processor._queue
    for _ in range(2000):
        request = tracer.request("request", {})
        request.note("queue", time.monotonic())
        request.end("ok")
        assert len(queue) <= 600
    begun_s = time.monotonic()
    tracer.close()
    assert time.monotonic() - begun_s < 20  # the SDK's own wait is 30 s


def test_without_an_endpoint_nothing_is_made():
    tracer = make_tracer("", "gateway", "g")
    assert type(tracer) is Tracer
    assert tracer.request("x", {"traceparent": TRACEPARENT}).child("y") is NO_SPAN
    assert NO_SPAN.headers == {} and NO_SPAN.traceparent == ""
    assert missing_packages() == []


@pytest.mark.parametrize("module", ["launch.gateway.app", "transfer.agent.server"])
def test_without_an_endpoint_nothing_is_imported(module):
    heavy = "{'grpc', 'opentelemetry.sdk', 'common.tracing.otlp'}"
    code = f"import {module}, sys; print(sorted({heavy} & sys.modules.keys()))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip() == "[]", run.stderr
