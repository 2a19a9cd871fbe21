"""The engine's control port outlives whatever goes wrong in an answer."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import zmq

from common.block import BlockKey, BlockLayout, Namespace
from common.ids import Incarnation, PlanId
from common.loads import EngineLoad, ModelBounds
from common.messages.codec import decode, encode
from common.messages.fields import Ping, Superseded
from common.messages.from_engines import EngineEnds, EngineHello, PlanAccepted, PlanRefused
from common.messages.from_gateway import CommitWeights, EndPlan, EnginePlan, KnownAgents
from engine.control import ControlServer
from engine.plans import Plans
from engine.sglang.prefill import forward_hooks, request_hooks
from engine.weights import Weights
from tests.control import join, keys
from transfer.control.senders import GATEWAY

NAMESPACE = Namespace("model", "1", "float32", BlockLayout(64, 1, (8,)))
LOAD = EngineLoad("p0", "prefill", "agent-p0", Incarnation(1), "", 0, 0, 0, 100)
HELLO = EngineHello(LOAD, NAMESPACE, 8998, ModelBounds(100, 64, 60), [])


@pytest.fixture
def client(tmp_path):
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.RCVTIMEO, 5000)
        yield socket


def test_an_answer_that_fails_does_not_end_the_thread(client, tmp_path, caplog):
    endpoint = f"ipc://{tmp_path}/control"
    answers: Iterator[RuntimeError | EngineHello] = iter(
        [RuntimeError("a bug in the report"), HELLO]
    )

    def hello() -> EngineHello:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    plans = Plans(Weights(NAMESPACE), page_tokens=64)

    def on_plan(message: EnginePlan | EndPlan | CommitWeights) -> None:
        if isinstance(message, EnginePlan):
            plans.put(message)
        elif isinstance(message, EndPlan):
            plans.drop(message.rid)

    server = ControlServer(endpoint, on_plan, hello, plans.accepts, keys("p0"))
    join(client, endpoint, GATEWAY, "p0")
    client.send(encode(Ping()))
    client.send(b"rubbish")
    client.send(encode(EnginePlan(PlanId(7), "rid", NAMESPACE.digest(), [], [], [], 60.0)))
    client.send(encode(Ping()))
    assert decode(client.recv()) == PlanAccepted(PlanId(7))
    assert decode(client.recv()) == HELLO
    assert server.malformed_total == 1
    assert "a bug in the report" in caplog.text
    assert plans.get("rid") is not None
    client.send(encode(EndPlan(PlanId(7), "rid")))
    client.send(encode(EnginePlan(PlanId(8), "other", NAMESPACE.digest(), [], [], [], 60.0)))
    assert decode(client.recv()) == PlanAccepted(PlanId(8))
    assert plans.get("rid") is None


def test_a_plan_for_other_weights_is_refused_and_the_present_ones_are_told(client, tmp_path):
    endpoint = f"ipc://{tmp_path}/control"
    plans = Plans(Weights(NAMESPACE), page_tokens=64)
    ControlServer(endpoint, cast(Any, plans.put), lambda: HELLO, plans.accepts, keys("p0"))
    join(client, endpoint, GATEWAY, "p0")
    client.send(encode(EnginePlan(PlanId(7), "rid", bytes(32), [], [], [], 60.0)))
    assert decode(client.recv()) == HELLO
    assert decode(client.recv()) == PlanRefused(PlanId(7), "other weights by now", stale=True)
    assert plans.get("rid") is None


@pytest.mark.parametrize("reader", [[], [0, 1]])
def test_a_plan_that_nobody_can_carry_out_is_refused_with_the_reason(client, tmp_path, reader):
    endpoint = f"ipc://{tmp_path}/control"
    plans, blocks = Plans(Weights(NAMESPACE), page_tokens=64), [BlockKey(bytes(32))] * 2
    ControlServer(endpoint, cast(Any, plans.put), lambda: HELLO, plans.accepts, keys("p0"))
    join(client, endpoint, GATEWAY, "p0")
    plan = EnginePlan(PlanId(7), "rid", NAMESPACE.digest(), blocks, ["agent-p0"], reader, 60.0)
    client.send(encode(plan))
    assert decode(client.recv()) == PlanRefused(PlanId(7), plan.fault) and plan.fault
    assert plans.get("rid") is None


@pytest.mark.parametrize("updates", [0, 1])
def test_a_request_that_arrives_after_a_weight_update_is_aborted(updates, monkeypatch):
    plans, aborts = Plans(Weights(NAMESPACE), page_tokens=64), []
    plans.put(EnginePlan(PlanId(7), "rid", NAMESPACE.digest(), [], [], [], 60.0))
    for _ in range(updates):
        plans.weights.changed("2", is_clean=True)
    engine = SimpleNamespace(plans=plans, prefill_forwards=None)
    for hooks in (forward_hooks, request_hooks):
        monkeypatch.setattr(hooks, "runtime_if_up", lambda: engine)
    for rid in ("rid", "without a plan"):
        req = SimpleNamespace(rid=rid, set_finish_with_abort=lambda *reason: aborts.append(reason))
        request_hooks.before_add_request(None, req)
    assert len(aborts) == updates


def test_a_request_that_an_update_has_retracted_is_computed_anew(monkeypatch):
    """Its decode engine sends it again, with the tokens that it has, for all new KV."""
    plans, aborts = Plans(Weights(NAMESPACE), page_tokens=64), []
    plans.put(EnginePlan(PlanId(7), "rid", NAMESPACE.digest(), [], [], [], 60.0))
    engine = SimpleNamespace(plans=plans, prefill_forwards=None)
    for hooks in (forward_hooks, request_hooks):
        monkeypatch.setattr(hooks, "runtime_if_up", lambda: engine)
    req = SimpleNamespace(rid="rid", set_finish_with_abort=lambda *reason: aborts.append(reason))
    request_hooks.before_add_request(None, req)
    plans.weights.changed("2", is_clean=True)
    request_hooks.before_add_request(None, req)
    assert aborts == [] and plans.get("rid") is None


def test_last_words_are_said_at_the_next_ping_and_nothing_after_them(client, tmp_path):
    endpoint = f"ipc://{tmp_path}/last"

    def hello() -> EngineHello:
        raise RuntimeError("the scheduler has failed")

    plans = Plans(Weights(NAMESPACE), page_tokens=64)
    server = ControlServer(endpoint, lambda message: None, hello, plans.accepts, keys("p0"))
    words = EngineEnds(Incarnation(1), ["a"], "an error")
    with ThreadPoolExecutor(1) as pool:
        saying = pool.submit(server.say_last, words)
        join(client, endpoint, GATEWAY, "p0")
        while server._last_words is None:
            pass
        client.send(encode(Ping()))
        assert decode(client.recv()) == words
        saying.result(timeout=5)  # at once
    client.send(encode(Ping()))
    assert decode(client.recv()) == words


def test_a_gateway_of_an_earlier_term_is_refused_and_a_standby_is_told_who_leads(client, tmp_path):
    endpoint = f"ipc://{tmp_path}/control"
    plans, met = Plans(Weights(NAMESPACE), page_tokens=64), []
    ControlServer(
        endpoint, cast(Any, plans.put), lambda: HELLO, plans.accepts, keys("p0"), met.append
    )
    join(client, endpoint, GATEWAY, "p0")

    def asked(message: Any, answers: int = 1) -> list[Any]:
        client.send(encode(message))
        return [decode(client.recv()) for _ in range(answers)]

    def plan(number: int) -> EnginePlan:
        return EnginePlan(PlanId(number), "rid", NAMESPACE.digest(), [], [], [], 60.0)

    def hello(led_in: int) -> EngineHello:
        return msgspec.structs.replace(HELLO, led_in=led_in)

    assert asked(Ping()) == [hello(0)]
    assert asked(Ping(1000)) == [hello(1000)]
    assert asked(plan(1000)) == [PlanAccepted(PlanId(1000))]
    assert asked(Ping()) == [hello(1000)]  # of a standby
    client.send(encode(KnownAgents(7, {}, complete=True, term=2000)))
    assert asked(Ping(1000), 2) == [hello(2000), Superseded(2000)]
    assert asked(KnownAgents(8, {}, complete=True, term=1000)) == [Superseded(2000)]
    superseded, refused = asked(plan(1001), 2)
    assert superseded == Superseded(2000) and refused.plan == 1001 and not refused.stale
    assert asked(plan(2000)) == [PlanAccepted(PlanId(2000))]
    assert [known.number for known in met] == [7]


def test_last_words_are_for_the_active_gateway(client, tmp_path):
    endpoint = f"ipc://{tmp_path}/last-led"
    plans = Plans(Weights(NAMESPACE), page_tokens=64)
    server = ControlServer(endpoint, lambda message: None, lambda: HELLO, plans.accepts, keys("p0"))
    join(client, endpoint, GATEWAY, "p0")
    client.send(encode(Ping(1000)))
    client.recv()
    words = EngineEnds(Incarnation(1), ["a"], "an error")
    with ThreadPoolExecutor(1) as pool:
        saying = pool.submit(server.say_last, words)
        while server._last_words is None:
            pass
        client.send(encode(Ping()))
        assert decode(client.recv()) == words
        assert not server._said.is_set()
        client.send(encode(Ping(1000)))
        assert decode(client.recv()) == words
        saying.result(timeout=5)
    assert server._said.is_set()
