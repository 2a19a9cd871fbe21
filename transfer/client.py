"""An engine's links to all agents: one background thread, one DEALER socket for each agent that
the gateway knows.

``AgentLinks`` pings every agent each second, registers the engine with each new incarnation
that answers, and hands every other message to ``on_message(agent, message)`` in its own
thread. ``send`` is non-blocking and may be called from any thread: False means that the
agent is not connected or its queue is full, and nothing was sent.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from urllib.parse import urlsplit

import zmq

from common.ids import Incarnation
from common.messages.codec import MalformedMessage, Message, decode, encode
from common.messages.fields import Ping
from common.messages.from_agents import AgentHello, UnknownEngine
from common.messages.from_engines import RegisterEngine
from common.messages.from_gateway import KnownAgents
from transfer.control.keys import Keys
from transfer.control.sockets import connect

log = logging.getLogger(__name__)

QUEUE_MAX = 4096
PING_EVERY_S = 1.0
SILENT_AFTER_S = 5.0
REGISTER_AGAIN_S = 5.0
"""With an agent that does not know this engine: its connection may be another than it was."""


class _Link:
    def __init__(self, agent: str, socket: zmq.Socket[bytes], endpoint: str) -> None:
        self.agent = agent
        self.socket = socket
        self.endpoint = endpoint
        self.incarnation: Incarnation | None = None
        self.hello: AgentHello | None = None
        self.last_heard = -SILENT_AFTER_S
        self.registered_s = -REGISTER_AGAIN_S

    def transmit(self, message: Message) -> None:
        try:
            self.socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            kind = type(message).__name__
            log.warning("queue to agent full agent=%s dropped=%s", self.agent, kind)


class AgentLinks:
    """``endpoints``: agent name -> zmq endpoint. ``on_incarnation(agent, incarnation)`` is
    called when an agent shows a newer incarnation than before, ``on_hello`` with a greeting
    that is not the last one again."""

    def __init__(
        self,
        endpoints: dict[str, str],
        keys: Keys,
        hello: RegisterEngine,
        on_message: Callable[[str, Message], None],
        on_incarnation: Callable[[str, Incarnation], None] = lambda agent, incarnation: None,
        on_hello: Callable[[AgentHello], None] = lambda hello: None,
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._keys = keys
        self.malformed_total = 0
        self._hello = hello
        self._on_message = on_message
        self._on_incarnation = on_incarnation
        self._on_hello = on_hello
        self.on_left: Callable[[str], None] = lambda agent: None
        """Called with an agent that is not one of the cluster any more, or has moved."""
        self.heard = 0
        """Number of the last ``KnownAgents`` that was heeded."""
        self._links: dict[str, _Link] = {}
        """Replaced as a whole by the thread below, when an agent comes or goes."""
        self._known = KnownAgents(0, endpoints, complete=True)
        self._outbox: deque[tuple[str, Message]] = deque()
        self._closed = threading.Event()
        # Sockets belong to the thread below; a pair of inproc sockets wakes it for sends.
        self._wake_lock = threading.Lock()
        self._wake = self._context.socket(zmq.PAIR)
        self._woken = self._context.socket(zmq.PAIR)
        address = f"inproc://agent-links-{id(self)}"
        self._woken.bind(address)
        self._wake.connect(address)
        self._thread = threading.Thread(target=self._run, name="dualpath-links", daemon=True)
        self._thread.start()

    # ---- any thread ----

    def send(self, agent: str, message: Message) -> bool:
        """Queue a message for an agent that has answered lately."""
        if agent not in self._links or not self.alive(agent) or len(self._outbox) >= QUEUE_MAX:
            return False
        self._outbox.append((agent, message))
        self._wake_thread()
        return True

    def meet(self, known: KnownAgents) -> None:
        """Be linked to these agents; to others no more, if the list is complete."""
        self._known = known
        self._wake_thread()

    def linked(self) -> list[str]:
        """Agents that have taken this engine's registration."""
        return [
            agent
            for agent, link in self._links.items()
            if link.hello is not None and link.hello.credit_address
        ]

    def _wake_thread(self) -> None:
        with self._wake_lock, contextlib.suppress(zmq.Again):  # wake-ups are already waiting
            self._wake.send(b"", zmq.NOBLOCK)

    def incarnation(self, agent: str) -> Incarnation | None:
        """The newest incarnation seen, or None before the first answer or for a stranger."""
        link = self._links.get(agent)
        return link.incarnation if link is not None else None

    def host(self, agent: str) -> str:
        """Where it is; empty for a stranger, or where sockets are files."""
        link = self._links.get(agent)
        return urlsplit(link.endpoint).hostname or "" if link is not None else ""

    def alive(self, agent: str) -> bool:
        """Whether the agent has said anything in the last seconds."""
        link = self._links.get(agent)
        return link is not None and time.monotonic() - link.last_heard < SILENT_AFTER_S

    def set_hello(self, hello: RegisterEngine) -> None:
        """Register anew with every agent, e.g. under another namespace."""
        self._hello = hello
        for agent in self._links:
            self.send(agent, hello)

    def close(self) -> None:
        """End the thread within a second."""
        self._closed.set()
        self._thread.join(2 * PING_EVERY_S)

    # ---- the links' own thread ----

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._woken, zmq.POLLIN)
        names: dict[zmq.Socket[bytes], str] = {}
        heeded: KnownAgents | None = None
        next_ping = 0.0
        while not self._closed.is_set():
            if self._known is not heeded:
                heeded = self._known
                self._heed(heeded, poller, names)
            if time.monotonic() >= next_ping:
                next_ping = time.monotonic() + PING_EVERY_S
                for link in self._links.values():
                    link.transmit(Ping())
            wait_s = max(0.0, next_ping - time.monotonic())
            for socket, _ in poller.poll(int(wait_s * 1000) + 1):
                self._drain(socket, names.get(socket))
            while self._outbox:
                agent, message = self._outbox.popleft()
                if agent in self._links:  # it may have left since
                    self._links[agent].transmit(message)
        for link in self._links.values():
            link.socket.close()

    def _heed(
        self, known: KnownAgents, poller: zmq.Poller, names: dict[zmq.Socket[bytes], str]
    ) -> None:
        links = dict(self._links)
        for name, link in self._links.items():
            endpoint = known.endpoints.get(name)
            if endpoint == link.endpoint or (endpoint is None and not known.complete):
                continue  # else it has gone, or moved
            log.info("agent left name=%s endpoint=%s", name, link.endpoint)
            poller.unregister(link.socket)
            del links[name], names[link.socket]
            link.socket.close()
            self.on_left(name)
        for name in known.endpoints.keys() - links.keys():
            socket = self._context.socket(zmq.DEALER)
            link = links[name] = _Link(name, socket, known.endpoints[name])
            connect(link.socket, link.endpoint, self._keys, name, QUEUE_MAX)
            poller.register(link.socket, zmq.POLLIN)
            names[link.socket] = name
        self._links = links
        for link in links.values():
            link.transmit(Ping())
        self.heard = known.number

    def _drain(self, socket: zmq.Socket, agent: str | None) -> None:
        while True:
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if agent is None:
                continue
            try:
                self._received(agent, frames[-1])
            except Exception:  # the callbacks' own: without this thread the engine is deaf
                log.exception("message could not be handled agent=%s", agent)

    def _received(self, agent: str, frame: bytes) -> None:
        try:
            message = decode(frame)
        except MalformedMessage as error:
            self.malformed_total += 1
            log.warning("malformed message dropped agent=%s error=%s", agent, error)
            return
        link = self._links[agent]
        link.last_heard = time.monotonic()
        match message:
            case AgentHello() if message.agent == agent:
                is_news, link.hello = message != link.hello, message
                self._greeted(agent, link, message)
                if is_news:
                    self._on_hello(message)
            case UnknownEngine():
                self._register(link)
                self._on_message(agent, message)
            case _:
                self._on_message(agent, message)

    def _greeted(self, agent: str, link: _Link, hello: AgentHello) -> None:
        if link.incarnation is not None and hello.incarnation <= link.incarnation:
            due_s = link.registered_s + REGISTER_AGAIN_S
            if not hello.credit_address and time.monotonic() >= due_s:
                self._register(link)
            return
        link.incarnation = hello.incarnation
        log.info("agent met name=%s incarnation=%d", agent, hello.incarnation)
        self._register(link)
        self._on_incarnation(agent, hello.incarnation)

    def _register(self, link: _Link) -> None:
        link.registered_s = time.monotonic()
        link.transmit(self._hello)
