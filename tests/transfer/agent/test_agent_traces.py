"""Spans of a real agent: what it reads and delivers for a plan whose request has a trace."""

from __future__ import annotations

import pytest

from common.ids import PlanId
from common.messages.from_agents import JobEnded, ShareRead
from common.messages.from_gateway import ReadShare, Subscribe
from tests.common.collector import (
    CLIENT,
    NOT_SAMPLED,
    TRACE,
    TRACEPARENT,
    Collector,
    running_collector,
)
from tests.transfer.agent.agent_process import AgentProcess, FakeGateway, running_agent
from tests.transfer.agent.fake_engine import LAYOUT, FakeEngine, key_of
from tests.transfer.agent.test_agent import deliver, store

BLOCKS = range(8)
SIZE = len(BLOCKS) * LAYOUT.block_bytes


@pytest.fixture
def collector():
    with running_collector() as running:
        yield running


@pytest.fixture
def agent(tmp_path, collector):
    """With blocks on its SSD alone."""
    with running_agent(tmp_path, otlp_traces_endpoint=collector.endpoint) as running:
        yield running


def read(gateway: FakeGateway, plan: int, blocks: range, traceparent: str) -> ShareRead:
    keys = [key_of(block) for block in blocks]
    gateway.send(ReadShare(PlanId(plan), keys, 30, traceparent=traceparent))
    return gateway.wait(ShareRead, lambda share: share.plan == plan)


@pytest.mark.slow
def test_reads_and_deliveries_are_spans_of_the_request(agent: AgentProcess, collector: Collector):
    gateway, engine = FakeGateway(agent.control), FakeEngine("d0", {"a0": agent.control})
    try:
        gateway.send(Subscribe())
        before = engine.wait_alive("a0")
        store(engine, 1, BLOCKS)
        gateway.holdings(len(BLOCKS), "ssd")
        agent.kill()
        agent.start()
        engine.wait_alive("a0", incarnation=before)
        assert read(gateway, 9, range(9), TRACEPARENT).read_bytes == {"ssd": SIZE}
        deliver(engine, 2, 9, BLOCKS, range(30, 38))
        assert isinstance(end := engine.wait_end(2), JobEnded) and end.error == ""
        deliver(engine, 3, 9, range(20, 22), range(40, 42))
        assert isinstance(end := engine.wait_end(3), JobEnded) and "not in DRAM" in end.error
        # Nobody asked for traces of these.
        assert read(gateway, 10, BLOCKS, "").in_dram == [True] * 8
        assert read(gateway, 11, BLOCKS, NOT_SAMPLED).in_dram == [True] * 8
        assert read(gateway, 12, BLOCKS, TRACEPARENT).in_dram == [True] * 8
        spans = collector.wait(lambda span: True, 4)
        assert agent.stop() < 10
    finally:
        gateway.close()
        engine.kill()
    assert {(span.trace, span.parent) for span in spans} == {(TRACE, CLIENT)}
    assert {(span.service, span.process) for span in spans} == {("dualpath-agent", "a0")}
    from_ssd, from_dram = [s.attributes for s in spans if s.name == "read share"]
    assert from_ssd.pop("dualpath.slots_wait_s") >= 0
    assert from_ssd == {
        "dualpath.agent": "a0",
        "dualpath.plan": 9,
        "dualpath.blocks": 9,
        "dualpath.missing_blocks": 1,
        "dualpath.bytes": SIZE,
        "dualpath.bytes.ssd": SIZE,
        "dualpath.tier": ["ssd"],
        "dualpath.outcome": "incomplete",
    }
    assert (from_dram["dualpath.tier"], from_dram["dualpath.bytes"]) == (["dram"], 0)
    assert (from_dram["dualpath.plan"], from_dram["dualpath.outcome"]) == (12, "ok")
    done, failed = [span for span in spans if span.name == "deliver"]
    assert done.attributes == {
        "dualpath.agent": "a0",
        "dualpath.engine": "d0",
        "dualpath.plan": 9,
        "dualpath.blocks": 8,
        "dualpath.bytes": SIZE,
        "dualpath.outcome": "ok",
    }
    assert (failed.outcome, failed.is_error, done.is_error) == ("failed", True, False)
