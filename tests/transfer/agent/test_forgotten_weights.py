"""KV of weights that nobody has any more makes way."""

from __future__ import annotations

from common.messages.from_gateway import ForgetWeights
from tests.samples import by_name
from tests.transfer.agent.fake_engine import namespace
from tests.transfer.agent.test_agent import store


def test_an_agent_forgets_weights_when_it_is_told_so(agent, gateway, start_engine):
    gateway.send(ForgetWeights("job/1", shared=True))  # nothing of theirs is here, nor a store yet
    engine = start_engine("d0")
    store(engine, 1, range(4))
    gateway.send(ForgetWeights("job/1", shared=True))
    assert gateway.read(7, range(4)).in_dram == [True] * 4
    gateway.send(ForgetWeights(namespace().weight_version, shared=False))
    assert gateway.read(8, range(4, 8)).in_dram == [False] * 4  # the order has been heeded
    assert "weights forgotten version=1 " in agent.log()
    gateway.status(lambda s: by_name(s.samples).get('dualpath:agent_blocks{state="durable"}') == 0)
