"""An engine's runtime between a gateway, an agent and an SGLang that are made up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest
import torch
import zmq

from common.ids import Incarnation, PlanId
from common.loads import ModelBounds
from common.messages.codec import Message, decode, encode
from common.messages.fields import Ping
from common.messages.from_agents import AgentHello, JobEnded, PullEnded, UnknownEngine
from common.messages.from_engines import (
    EngineHello,
    PlanAccepted,
    PlanRefused,
    PullBlocks,
    RegisterEngine,
)
from common.messages.from_gateway import CommitWeights, EnginePlan, KnownAgents
from engine import runtime as runtime_module
from engine.config import EngineConfig
from engine.host import Host
from engine.kv_memory import KvMemory
from engine.ranks.group import CreditsAt
from engine.report import EngineIdentity
from engine.runtime import EngineRuntime
from engine.streams import Streams
from tests.control import SECRET, join, stand_in_for
from tests.engine.parts import NAMESPACE, Allocator, Request, keys_of
from transfer import client
from transfer.control.senders import GATEWAY

T = TypeVar("T")
AGENT_INCARNATION = Incarnation(9)


class Peer:
    """A socket's other end; messages are taken by kind, others are put aside."""

    def __init__(self, socket: zmq.Socket[bytes], name: str = "own") -> None:
        self._socket = socket
        self._name = name
        self._sender: list[bytes] = []
        self._others: list[Message] = []

    def send(self, message: Message) -> None:
        self._socket.send_multipart([*self._sender, encode(message)])

    def take(self, kind: type[T], is_it: Callable[[T], bool] = lambda message: True) -> T:
        """The next message of this kind that is meant; pings are answered meanwhile."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for message in self._others:
                if isinstance(message, kind) and is_it(message):
                    self._others.remove(message)
                    return message
            if self._socket.poll(1000):
                *self._sender, frame = self._socket.recv_multipart()
                message = decode(frame)
                if isinstance(message, Ping):
                    self.send(AgentHello(self._name, AGENT_INCARNATION, "h:2"))
                else:
                    self._others.append(message)
        raise AssertionError(f"no {kind.__name__}, but {self._others}")


class TransferEngine:
    """Mooncake's, without a network."""

    def register(self, ptr: int, length: int) -> None:
        pass

    def get_session_id(self) -> str:
        return "h:1"

    def transfer_sync(
        self, session_id: str, buffer: int, peer_buffer_address: int, length: int
    ) -> int:
        return 0


def scheduler() -> Any:
    """SGLang's, of one rank, without requests."""
    allocator: Any = Allocator(64)
    allocator.num_pages = 64
    no_queue = SimpleNamespace(queue=[])
    return SimpleNamespace(
        attn_tp_group=SimpleNamespace(rank_in_group=0, world_size=1, cpu_group=None),
        token_to_kv_pool_allocator=allocator,
        req_to_token_pool=SimpleNamespace(req_to_token=torch.arange(256).reshape(1, 256) + 40),
        tree_cache=SimpleNamespace(evictable_size=lambda: 0),
        device="cpu",
        running_batch=SimpleNamespace(reqs=[]),
        waiting_queue=[],
        chunked_req=None,
        sliding_window_size=None,
        disagg_prefill_bootstrap_queue=None,
        disagg_decode_prealloc_queue=no_queue,
        disagg_decode_transfer_queue=no_queue,
    )


@pytest.fixture
def peers(tmp_path) -> Iterator[tuple[Peer, Peer]]:
    """A gateway and the engine's own agent."""
    with zmq.Context() as context:
        gateway, agent = context.socket(zmq.DEALER), context.socket(zmq.ROUTER)
        stand_in_for(agent, f"ipc://{tmp_path}/agent", "own")
        join(gateway, f"ipc://{tmp_path}/control", GATEWAY, "d0")
        yield Peer(gateway), Peer(agent)
        for socket in (gateway, agent):
            socket.close(linger=0)


@pytest.fixture
def engine(tmp_path, monkeypatch, peers) -> Iterator[EngineRuntime]:
    monkeypatch.setattr(runtime_module, "model_digest", lambda folder: NAMESPACE.model_digest)
    monkeypatch.setattr(client, "PING_EVERY_S", 0.05)
    config = EngineConfig(
        name="d0",
        role="decode",
        controls=[],
        agent="own",
        agents={"own": f"ipc://{tmp_path}/agent"},
        control_secret=SECRET,
    )
    own = scheduler()
    host = Host(
        identity=EngineIdentity(
            "d0", "decode", "own", "d0", Incarnation(3), 0, ModelBounds(100, 64, 60)
        ),
        control=f"ipc://{tmp_path}/control",
        scheduler=own,
        transfer_engine=cast(Any, TransferEngine()),
        data_port=0,
        memory=KvMemory(NAMESPACE.layout, [[1, 2]] * 3, NAMESPACE.kv_dtype),
        allocators=[own.token_to_kv_pool_allocator],
        window=None,
        states=None,
        streams=Streams(),
        model_path="/models/x",
        weight_version=NAMESPACE.weight_version,
        settings=NAMESPACE.settings,
    )
    engine = EngineRuntime(config, host)
    yield engine
    cast(Any, engine.links).close()


def test_plans_and_weights_are_agreed_on_with_the_gateway_and_told_to_agents(engine, peers):
    gateway, agent = peers
    registered = agent.take(RegisterEngine)
    assert (registered.engine, registered.namespace) == ("d0", NAMESPACE)
    (memory,) = registered.ranks
    assert (memory.session_id, memory.kv_addresses) == ("h:1", [[1, 2]] * 3)
    gateway.send(EnginePlan(PlanId(7), "r", NAMESPACE.digest(), [], [], [], 60.0))
    assert gateway.take(PlanAccepted).plan == 7 and engine.plans.get("r").id == 7
    engine.weights.changed("2", is_clean=True)
    gateway.send(EnginePlan(PlanId(8), "s", NAMESPACE.digest(), [], [], [], 60.0))
    hello = gateway.take(EngineHello)
    assert hello.weights.version == "2" and not hello.weights.is_named
    assert gateway.take(PlanRefused).plan == 8 and engine.plans.get("s") is None
    agent.take(RegisterEngine, lambda registered: registered.namespace == hello.namespace)
    gateway.send(CommitWeights(hello.weights.number, "job/2", is_doubtful=False))
    steps = time.monotonic() + 10
    while not engine.weights.state.is_named and time.monotonic() < steps:
        engine.ranks.arrived(list(engine.ranks.take()))  # SGLang's broadcast
    gateway.send(Ping())
    named = gateway.take(EngineHello)
    assert named.weights.is_named and named.namespace.weight_version == "job/2"
    agent.take(RegisterEngine, lambda registered: registered.namespace == named.namespace)


def test_an_agents_word_about_a_job_counts_if_it_is_the_incarnation_that_has_it(engine, peers):
    _, agent = peers
    agent.take(RegisterEngine)
    request = Request("r", list(range(18)))
    engine.persister.begin(request)
    engine.persister.advance(request, 18)
    pull = agent.take(PullBlocks)
    assert pull.keys == keys_of(request, engine.weights.digest)
    assert pull.pages == [10, 11, 12, 13]
    agent.send(PullEnded(Incarnation(8), pull.job, [True] * 4))
    agent.send(JobEnded(Incarnation(8), pull.job, ""))
    agent.send(PullEnded(AGENT_INCARNATION, pull.job, [True, True, True, False]))
    wait_until(lambda: len(engine.jobs) == 0)
    assert engine.persister.stored_blocks_total == 3 and engine.holds.held_pages() == []


def test_a_job_that_an_agent_does_not_know_is_over(engine, peers):
    _, agent = peers
    agent.take(RegisterEngine)
    request = Request("r", list(range(18)))
    engine.persister.begin(request)
    engine.persister.advance(request, 18)
    agent.send(UnknownEngine(AGENT_INCARNATION, agent.take(PullBlocks).job))
    wait_until(lambda: len(engine.jobs) == 0)
    assert engine.persister.stored_blocks_total == 0
    agent.take(RegisterEngine)


def test_agents_that_come_and_go_are_linked_to_and_forgotten(engine, peers, tmp_path):
    gateway, own = peers
    engine.credits_at["own"] = CreditsAt("own", "h:2", 4096)
    with zmq.Context() as context:
        socket = context.socket(zmq.ROUTER)
        stand_in_for(socket, f"ipc://{tmp_path}/newcomer", "new")
        newcomer = Peer(socket, "new")
        known = {"own": f"ipc://{tmp_path}/agent", "new": f"ipc://{tmp_path}/newcomer"}
        gateway.send(KnownAgents(5, known, complete=True))
        assert newcomer.take(RegisterEngine).engine == "d0"
        own.take(RegisterEngine)
        newcomer.send(AgentHello("new", AGENT_INCARNATION, "h:3", credit_address=4096))
        wait_until(lambda: engine.links.linked() == ["new"])
        gateway.send(Ping())
        hello = gateway.take(EngineHello)
        assert (hello.heard, hello.load.linked) == (5, ["new"])
        del known["own"]
        gateway.send(KnownAgents(6, known, complete=True))
        wait_until(lambda: "own" not in engine.credits_at)
        assert engine.links.heard == 6 and engine.links.incarnation("own") is None
        socket.close(linger=0)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
