"""One trace of a request over the whole of a real cluster: gateway, P, D and agents."""

from __future__ import annotations

from tests.cluster import prompt
from tests.common.collector import CLIENT, TRACE, TRACEPARENT, Span
from tests.served.conftest import WITH_THE_CLUSTER

PAGE = 64
BLOCK_BYTES = 8192 * PAGE
BLOCKS = 5
IDS = prompt(BLOCKS * PAGE + 10, seed=5)

pytestmark = WITH_THE_CLUSTER


def of_sglang(spans: list[Span], attempt: Span) -> dict[str, Span]:
    """The spans with which SGLang begins at each engine."""
    roots = [s for s in spans if s.service == "sglang" and s.parent == attempt.id]
    return {root.process: root for root in roots}


def test_one_request_is_one_trace_with_the_right_parents(cluster, collector):
    cluster.generate(IDS)
    cluster.wait_stored()
    cluster.restart_agents()
    cluster.flush_engines()
    answer = cluster.generate(IDS, headers={"traceparent": TRACEPARENT})
    assert answer.cached_tokens == BLOCKS * PAGE

    def in_trace(span: Span) -> bool:
        return span.trace == TRACE

    collector.wait(lambda s: in_trace(s) and s.name == "deliver", 2)
    collector.wait(lambda s: in_trace(s) and s.name == "POST /generate")
    collector.wait(lambda s: in_trace(s) and s.service == "sglang" and "Req" in s.name, 2)
    spans = [span for span in collector.spans if in_trace(span)]
    [request] = [s for s in spans if s.name == "POST /generate"]
    [attempt] = [s for s in spans if s.name == "attempt"]
    assert (request.parent, attempt.parent) == (CLIENT, request.id)
    assert attempt.attributes["dualpath.plan"] == answer.trace["plan"]

    roots = of_sglang(spans, attempt)
    decode = answer.trace["decode"]
    assert roots.keys() == {"p0", decode}
    for engine, forward in (("p0", "prefill_forward"), (decode, "decode_forward")):

        def is_computing(span: Span, name: str = forward, root: Span = roots[engine]) -> bool:
            return span.name == name and root in collector.ancestors(span)

        assert {span.process for span in collector.wait(is_computing)} == {engine}

    shares = [s for s in spans if s.name == "read share"]
    read = [s.attributes.get(f"dualpath.bytes.{t}", 0) for s in shares for t in ("ssd", "remote")]
    assert sum(read) == BLOCKS * BLOCK_BYTES
    delivered = {s.attributes["dualpath.engine"]: 0 for s in spans if s.name == "deliver"}
    for span in spans:
        if span.name == "deliver":
            delivered[span.attributes["dualpath.engine"]] += span.attributes["dualpath.bytes"]
    assert delivered == {"p0": BLOCKS * BLOCK_BYTES, decode: BLOCKS * BLOCK_BYTES}
    for span in (s for s in spans if s.service == "dualpath-agent"):
        assert span.parent == attempt.id
        assert span.process == span.attributes["dualpath.agent"]
        assert span.process in answer.reader_agents
        assert (span.outcome, span.is_error) == ("ok", False)
