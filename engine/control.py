"""The engine's control port: plans from the gateway, and signs of life."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import zmq
from msgspec import structs

from common.cluster.leader import Leader
from common.messages.codec import MalformedMessage, Message, encode
from common.messages.fields import Ping, Superseded
from common.messages.from_engines import EngineEnds, EngineHello, PlanAccepted, PlanRefused
from common.messages.from_gateway import CommitWeights, EndPlan, EnginePlan, KnownAgents
from transfer.control.keys import Keys
from transfer.control.senders import GATEWAY, LAUNCHER, decode_from
from transfer.control.sockets import Doorkeeper, bind, sender_of

log = logging.getLogger(__name__)

LAST_WORDS_S = 2.0
"""The gateway pings every second."""
_QUEUE_MAX = 1000


class ControlServer:
    """A ROUTER socket served by one thread of its own. ``on_plan`` is called there, with plans
    that the engine ``accepts``, which those for other weights are not, and the
    weights' name."""

    def __init__(
        self,
        endpoint: str,
        on_plan: Callable[[EnginePlan | EndPlan | CommitWeights], None],
        hello: Callable[[], EngineHello],
        accepts: Callable[[EnginePlan], bool],
        keys: Keys,
        meet: Callable[[KnownAgents], None] = lambda known: None,
    ) -> None:
        """``meet``: told whom the engine is to be linked to."""
        self._on_plan = on_plan
        self._hello = hello
        self._accepts = accepts
        self._meet = meet
        self._leader = Leader()
        self._last_words: EngineEnds | None = None
        self._said = threading.Event()
        self.malformed_total = 0
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()  # SGLang uses the common one
        self._doorkeeper = Doorkeeper(context, keys, (GATEWAY, LAUNCHER))
        self._socket = context.socket(zmq.ROUTER)
        bind(self._socket, endpoint, keys, _QUEUE_MAX)
        threading.Thread(target=self._serve, name="dualpath-control", daemon=True).start()

    def say_last(self, words: EngineEnds) -> None:
        """From now on the only answer to a ping; returns when the gateway has been given it, or
        has not asked for ``LAST_WORDS_S``."""
        self._last_words = words
        self._said.wait(LAST_WORDS_S)

    def _serve(self) -> None:
        while True:
            client, *frames = self._socket.recv_multipart(copy=False)
            last = frames[-1] if frames else client
            try:
                sender = sender_of(last)
                message = decode_from(sender, last.bytes)
                for answer in self._answers(message):
                    self._socket.send_multipart([client.bytes, encode(answer)])
                    if answer is self._last_words and self._is_leaders(message, sender):
                        self._said.set()
            except MalformedMessage as error:
                self.malformed_total += 1
                log.warning("malformed control message dropped: %s", error)
            except Exception:
                # Without this thread the engine would count as dead, whatever it serves.
                log.exception("control message not answered")

    def _is_leaders(self, message: Message, sender: str) -> bool:
        """Whether it is the active gateway's ping: its standbys send some, too."""
        is_ping = isinstance(message, Ping) and message.term == self._leader.term
        return is_ping and sender == GATEWAY

    def _answers(self, message: Message) -> list[Message]:
        match message:
            case Ping() if self._last_words is not None:
                return [self._last_words]
            case Ping(term=term):
                is_old = term > 0 and not self._leader.heard(term)
                hello = structs.replace(self._hello(), led_in=self._leader.present_term)
                return [hello, Superseded(self._leader.term)] if is_old else [hello]
            case EnginePlan() if not self._leader.has_given(message.id):
                refusal = PlanRefused(message.id, "another gateway has taken over")
                return [Superseded(self._leader.term), refusal]
            case EnginePlan():
                if message.fault:
                    log.warning("plan refused plan=%d: %s", message.id, message.fault)
                    return [PlanRefused(message.id, message.fault)]
                if not self._accepts(message):
                    return [
                        self._hello(),
                        PlanRefused(message.id, "other weights by now", stale=True),
                    ]
                self._on_plan(message)
                return [PlanAccepted(message.id)]
            case EndPlan():
                self._on_plan(message)
            case CommitWeights(term=term):
                if not self._leader.heard(term):
                    return [Superseded(self._leader.term)]
                self._on_plan(message)
            case KnownAgents(term=term):
                if not self._leader.heard(term):
                    return [Superseded(self._leader.term)]
                self._meet(message)
        return []
