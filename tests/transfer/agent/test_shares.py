"""What an agent takes for a share of a plan."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from common.block import BlockKey
from common.experiment import Experiment
from common.ids import PlanId
from common.messages.from_agents import ShareRead
from common.messages.from_gateway import ReadShare
from common.tracing.spans import Tracer
from transfer.agent.plan_spans import PlanSpans
from transfer.agent.shares import Shares

KEYS = [BlockKey(b"a" * 32), BlockKey(b"b" * 32)]
ZERO_IO = ReadShare(PlanId(7), KEYS, 10.0, Experiment(zero_io=True))


def shares_of(takes_zero_io: bool, answers: list[ShareRead]) -> Shares:
    def reply(client: bytes, answer: ShareRead) -> None:
        answers.append(answer)

    no_store = cast(Any, None)  # a share without I/O asks nothing of it
    spans = PlanSpans(Tracer(), "a0")
    return Shares(no_store, reply, lambda: None, lambda layout: True, takes_zero_io, spans)


@pytest.mark.asyncio
@pytest.mark.parametrize("takes", [False, True])
async def test_only_an_agent_of_a_measurement_counts_unread_blocks_as_read(takes: bool, caplog):
    answers: list[ShareRead] = []
    shares = shares_of(takes, answers)
    shares.start(b"gateway", ZERO_IO)
    await asyncio.sleep(0)
    assert [answer.in_dram for answer in answers] == [[takes, takes]]
    assert shares.is_zero_io(PlanId(7)) is takes
    assert ("refused" in caplog.text) is not takes
