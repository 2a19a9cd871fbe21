"""An agent obeys the gateway that has taken over, and no other any more."""

from __future__ import annotations

import pytest

from common.ids import PlanId
from common.messages.fields import Ping, Superseded
from common.messages.from_agents import ShareRead
from common.messages.from_gateway import KnownEngines, ReadShare, ReleasePlan
from tests.samples import by_name
from tests.transfer.agent.agent_process import FakeGateway
from tests.transfer.agent.fake_engine import key_of
from tests.transfer.agent.test_agent import store

OLD, NEW = 1000, 2000


@pytest.mark.parametrize("slots", [8])
def test_slots_of_a_former_gateways_plans_are_for_the_new_ones(agent, gateway, start_engine):
    engine = start_engine("d0")
    for first in (0, 6):
        store(engine, 1 + first, range(first, first + 6))
        gateway.status(
            lambda s, n=first + 6: by_name(s.samples)['dualpath:agent_blocks{state="durable"}'] == n
        )
    gateway.send(KnownEngines(5, ["d0"], complete=True, term=OLD))
    gateway.status(lambda status: status.led_in == OLD)
    assert gateway.read(OLD, range(6)).in_dram == [True] * 6

    newcomer = FakeGateway(agent.control)
    try:
        newcomer.send(Ping())  # as its standby
        newcomer.send(ReadShare(PlanId(NEW), [key_of(block) for block in range(6, 12)], 30.0))
        gateway.status(lambda s: by_name(s.samples)['dualpath:agent_plans{state="waiting"}'] == 1)
        newcomer.send(Ping(NEW))
        share = newcomer.wait(ShareRead)
        assert share.plan == NEW and share.in_dram == [True] * 6
        gateway.status(lambda status: status.led_in == NEW)

        gateway.send(Ping(OLD))
        assert gateway.wait(Superseded) == Superseded(NEW)
        gateway.send(KnownEngines(6, [], complete=True, term=OLD))
        assert gateway.wait(Superseded) == Superseded(NEW)
        gateway.send(ReadShare(PlanId(OLD + 2), [key_of(0)], 30.0))
        assert gateway.wait(Superseded) == Superseded(NEW)
        gateway.send(ReleasePlan(PlanId(OLD)))  # its own, which is gone
        assert newcomer.read(NEW + 1, range(6, 12)).in_dram == [True] * 6
        assert gateway.status().heard == 5
    finally:
        newcomer.close()
