"""Traces of the gateway: a request's spans, and with what engines and agents go on in them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common.messages.from_gateway import ReadShare
from tests.common.collector import CLIENT, TRACE, TRACEPARENT, Collector, Span, running_collector
from tests.launch.gateway.client import CHAT, GENERATE, PROMPT, keys_of, post
from tests.launch.gateway.stubs import running_cluster as cluster_of

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

COMPLETION = {"model": "stub", "prompt": PROMPT, "n": 3}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with running_collector() as running:
        yield running


def of(span: Span) -> str:
    """How a ``traceparent`` of it begins; two digits of flags follow."""
    return f"00-{span.trace}-{span.id}-"


async def test_a_request_is_a_span_of_its_clients_and_hands_its_own_on(collector) -> None:
    endpoint = collector.endpoint
    async with cluster_of(path_policy="decode", otlp_traces_endpoint=endpoint) as cluster:
        agent = cluster.agents["node-d"]
        await cluster.announce(agent.name, keys_of(PROMPT)[:2])
        headers = {"traceparent": TRACEPARENT, "x-request-id": "of no interest"}
        async with cluster.http.post("/v1/chat/completions", json=CHAT, headers=headers) as answer:
            assert answer.status == 200
    [request] = collector.named("POST /v1/chat/completions")
    [attempt] = collector.named("attempt")
    assert (request.trace, request.parent) == (TRACE, CLIENT)
    assert (request.service, request.process) == ("dualpath-gateway", "gateway")
    assert (request.outcome, request.is_error, attempt.outcome) == ("ok", False, "ok")
    assert request.attributes["dualpath.prompt_tokens"] == len(PROMPT)
    assert attempt.parent == request.id
    stages = collector.wait(lambda span: span.parent == attempt.id, 5)
    assert {span.name for span in stages} == {"queue", "read", "hand over", "prefill", "first byte"}
    assert [s.parent for s in collector.named("tokenize")] == [request.id]
    [read] = collector.named("read")
    assert read.attributes == {"dualpath.planned_blocks": 2, "dualpath.hit_blocks": 2}
    [share] = agent.got(ReadShare)
    assert share.traceparent == of(attempt) + "01"
    assert attempt.attributes["dualpath.plan"] == share.plan
    for engine in cluster.engines:
        assert engine.traceparents == [of(attempt) + "01"]
    for span in (attempt, *stages):
        assert request.begun_ns <= span.begun_ns <= span.ended_ns
    # Not a word of what was asked and answered.
    assert PROMPT not in str(collector.spans)


async def test_every_attempt_is_a_span(collector) -> None:
    async with cluster_of(decodes=2, otlp_traces_endpoint=collector.endpoint) as cluster:
        cluster.decodes[0].faults = ["500"]
        assert (await post(cluster, "/generate", GENERATE))[0] == 200
    attempts = sorted(collector.named("attempt", 2), key=lambda span: span.begun_ns)
    assert [(a.outcome, a.is_error) for a in attempts] == [("failed", True), ("ok", False)]
    tried = [engine.name for engine in cluster.decodes]
    assert [a.attributes["dualpath.decode"] for a in attempts] == tried
    [request] = collector.named("POST /generate")
    assert {a.parent for a in attempts} == {request.id} and request.parent == ""
    for engine, attempt in zip(cluster.decodes, attempts, strict=True):
        [traceparent] = engine.traceparents
        assert traceparent.startswith(of(attempt))


async def test_samples_are_attempts_of_one_request_and_refusals_are_spans_too(collector) -> None:
    async with cluster_of(otlp_traces_endpoint=collector.endpoint) as cluster:
        assert (await post(cluster, "/v1/completions", COMPLETION))[0] == 200
        assert (await post(cluster, "/generate", {"text": 5}))[0] == 400
    [request] = collector.named("POST /v1/completions")
    attempts = collector.named("attempt", 3)
    assert {span.parent for span in attempts} == {request.id}
    assert request.attributes["dualpath.parts"] == 3
    [refused] = collector.named("POST /generate")
    assert (refused.outcome, refused.is_error) == ("client_error", False)


async def test_without_a_collector_nobody_hears_of_a_trace() -> None:
    async with cluster_of(path_policy="decode") as cluster:
        agent = cluster.agents["node-d"]
        await cluster.announce(agent.name, keys_of(PROMPT)[:2])
        headers = {"traceparent": TRACEPARENT}
        async with cluster.http.post("/generate", json=GENERATE, headers=headers) as answer:
            assert answer.status == 200
        assert [share.traceparent for share in agent.got(ReadShare)] == [""]
        assert [e.traceparents for e in cluster.engines] == [[None], [None]]


async def test_requests_are_answered_while_the_collector_is_away() -> None:
    async with cluster_of(otlp_traces_endpoint="127.0.0.1:9") as cluster:
        for _ in range(5):
            assert (await post(cluster, "/generate", GENERATE))[0] == 200
