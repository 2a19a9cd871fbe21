"""The engine's control port outlives whatever goes wrong in an answer."""

from __future__ import annotations

import pytest
import zmq

from engine.control import ControlServer
from engine.plans import Plans
from storage.block import BlockLayout, Namespace
from transfer.messages import EndPlan, EngineHello, EnginePlan, Ping, PlanAccepted, decode, encode

NAMESPACE = Namespace("model", "1", "float32", BlockLayout(64, 1, (8,)))
HELLO = EngineHello("p0", "prefill", 1, NAMESPACE, 8998, "", 0, 0, 0, 100, None, {})


@pytest.fixture
def client(tmp_path):
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 5000)
        yield socket


def test_an_answer_that_fails_does_not_end_the_thread(client, tmp_path, caplog):
    endpoint = f"ipc://{tmp_path}/control"
    answers = iter([RuntimeError("a bug in the report"), HELLO])

    def hello() -> EngineHello:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    plans = Plans()

    def on_plan(message: EnginePlan | EndPlan) -> None:
        plans.put(message) if isinstance(message, EnginePlan) else plans.drop(message.rid)

    server = ControlServer(endpoint, on_plan, hello)
    client.connect(endpoint)
    client.send(encode(Ping()))
    client.send(b"rubbish")
    client.send(encode(EnginePlan(7, "rid", [], [], [], 60.0)))
    client.send(encode(Ping()))
    assert decode(client.recv()) == PlanAccepted(7)
    assert decode(client.recv()) == HELLO
    assert server.malformed_total == 1
    assert "a bug in the report" in caplog.text
    assert plans.get("rid") is not None
    client.send(encode(EndPlan(7, "rid")))
    client.send(encode(EnginePlan(8, "other", [], [], [], 60.0)))
    assert decode(client.recv()) == PlanAccepted(8)
    assert plans.get("rid") is None
