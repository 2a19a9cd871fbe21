"""Who holds the secret connects, as itself, and says what it may, in frames of bounded size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import zmq

from common.block import BlockLayout, Namespace
from common.ids import BoardSlot, Incarnation, JobId, PlanId
from common.messages.codec import MalformedMessage, Message, encode
from common.messages.fields import Ping
from common.messages.from_engines import CancelJob, Deliver, PullBlocks, RankMemory, RegisterEngine
from common.messages.from_gateway import (
    EndPlan,
    EnginePlan,
    ForgetWeights,
    KnownAgents,
    KnownEngines,
    ReadShare,
    ReleasePlan,
    Subscribe,
)
from common.process_settings import BadSettings
from tests.control import keys
from transfer.control import sockets
from transfer.control.keys import BadSecret, Keys, read_secret
from transfer.control.senders import GATEWAY, LAUNCHER, decode_from
from transfer.control.sockets import Doorkeeper, bind, connect, sender_of

OURS = [
    Subscribe(),
    ReadShare(PlanId(1), [], 1.0),
    EnginePlan(PlanId(1), "rid", bytes(32), [], [], [], 1.0),
    KnownAgents(1, {}, True),
    KnownEngines(1, [], True),
    ForgetWeights("job/1", True),
    EndPlan(PlanId(1), "rid"),
]
"""The gateway's."""
ENGINES = [
    Deliver(JobId(1), PlanId(1), [], [], BoardSlot(0), True, 1.0),
    PullBlocks(JobId(1), [], [], 1.0),
    CancelJob(JobId(1)),
    RegisterEngine(
        "p0",
        Incarnation(1),
        Namespace("m", "1", "float32", BlockLayout(1, 1, (1,))),
        1,
        [RankMemory("h:1", [[1]], 1)],
        1,
        1,
    ),
]


@pytest.fixture
def doorkeeper() -> Iterator[Doorkeeper]:
    """Lets the gateway and p0 in."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = Doorkeeper(context, keys("a0"), [GATEWAY, "p0"])
    yield made
    made.stop()
    context.destroy(0)


@pytest.fixture
def server(tmp_path, doorkeeper) -> Iterator[tuple[zmq.Socket[bytes], str]]:
    context, endpoint = doorkeeper.context, f"ipc://{tmp_path}/server"
    socket = context.socket(zmq.ROUTER)
    bind(socket, endpoint, keys("a0"), 10)
    yield socket, endpoint


@pytest.fixture
def say(server) -> Iterator[Callable[..., str | None]]:
    """``say(own, frame)``: by whom the server was told it, None if it was not."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket, endpoint = server
    clients = []

    def said(
        own: Keys | None, frame: bytes = b"word", name: str = "a0", wait_ms: int = 5000
    ) -> str | None:
        client = context.socket(zmq.DEALER)
        clients.append(client)
        client.setsockopt(zmq.LINGER, 0)
        if own is None:
            client.connect(endpoint)
        else:
            connect(client, endpoint, own, name, 10)
        client.send(frame)
        if not socket.poll(wait_ms):
            return None
        _, heard = socket.recv_multipart(copy=False)
        assert heard.bytes == frame
        return sender_of(heard)

    yield said
    context.destroy(0)


def test_whoever_holds_the_secret_is_known_by_name(say):
    assert say(keys(GATEWAY)) == GATEWAY
    assert say(keys("p0")) == "p0"


def test_nobody_else_gets_in(say):
    assert say(None, wait_ms=200) is None  # without keys
    assert say(keys("p1"), wait_ms=200) is None  # a name that is not expected here
    assert say(Keys("other", "another secret of as many letters"), wait_ms=200) is None
    assert say(keys(LAUNCHER), name="a1", wait_ms=200) is None  # takes the server for another one
    assert say(keys("p0")) == "p0"


def test_who_is_let_in_later_comes_in_by_itself(say, server, doorkeeper, monkeypatch):
    monkeypatch.setattr(sockets, "HANDSHAKE_MS", 300)
    assert say(keys("p1"), wait_ms=600) is None  # it goes on trying
    doorkeeper.let_in([GATEWAY, "p1"])
    assert server[0].poll(10_000)
    _, heard = server[0].recv_multipart(copy=False)
    assert sender_of(heard) == "p1"
    assert say(keys("p0"), wait_ms=200) is None


def test_a_server_without_a_doorkeeper_lets_nobody_in(tmp_path):
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    server, client = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    bind(server, f"ipc://{tmp_path}/server", keys("a0"), 10)
    connect(client, f"ipc://{tmp_path}/server", keys(GATEWAY), "a0", 10)
    client.send(b"word")
    assert not server.poll(300)
    context.destroy(0)


def test_who_sends_too_much_is_not_heard_and_others_are(say):
    assert say(keys("p0"), bytes(sockets.MESSAGE_BYTES_MAX - 64)) == "p0"
    assert say(keys("p0"), bytes(sockets.MESSAGE_BYTES_MAX + 1), wait_ms=500) is None
    assert say(keys(GATEWAY)) == GATEWAY


@pytest.mark.parametrize("message", [*OURS, *ENGINES], ids=lambda message: type(message).__name__)
def test_plans_are_the_gateways_and_an_engine_speaks_for_itself(message: Message):
    for sender in (GATEWAY, LAUNCHER, "p0", "p1"):
        may = sender == GATEWAY if message in OURS else sender in ("p0", "p1")
        may = may and not (isinstance(message, RegisterEngine) and sender == "p1")
        if may:
            assert decode_from(sender, encode(message)) == message
        else:
            with pytest.raises(MalformedMessage, match=sender):
                decode_from(sender, encode(message))


def test_everyone_may_ask_for_a_sign_of_life():
    for sender, message in itertools.product((GATEWAY, LAUNCHER, "p0"), [Ping()]):
        assert decode_from(sender, encode(message)) == message
    assert decode_from("p0", encode(ReleasePlan(PlanId(1))))
    with pytest.raises(MalformedMessage):
        decode_from(LAUNCHER, encode(ReleasePlan(PlanId(1))))


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        ("x" * 32, 0o640, "chmod 600"),
        ("x" * 32, 0o602, "chmod 600"),
        ("x" * 31 + "\n", 0o600, "32 are the least"),
        (None, 0o600, "No such file"),
    ],
)
def test_a_secret_that_is_none_is_refused_with_what_to_do(tmp_path, content, mode, words):
    file = tmp_path / "secret"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)
    with pytest.raises(BadSecret, match=words):
        read_secret(file)
    file.write_text("x" * 32 + "\n")
    file.chmod(0o400)
    assert read_secret(file) == "x" * 32


def test_there_are_no_keys_without_a_secret():
    with pytest.raises(BadSettings, match="p0"):
        Keys("p0", "")
