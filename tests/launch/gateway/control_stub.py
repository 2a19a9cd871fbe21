"""The half that stubs of engines and agents share: a control socket, and what came in there."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import zmq
import zmq.asyncio

from common.cluster.leader import Leader
from common.ids import GAVE_UP_STATUS, PLAN_OUTDATED, Incarnation
from common.messages.codec import decode, encode
from common.messages.fields import Ping, Superseded
from common.messages.from_gateway import EnginePlan, KnownAgents, KnownEngines, ReadShare
from tests.common.ports import free_port
from tests.control import stand_in_for

REFUSALS = {
    "400": (400, "fault 400"),
    "500": (500, "fault 500"),
    "named": (400, "request {rid} is refused"),
    "load": (503, "External KV cache load failed"),
    "outdated": (503, PLAN_OUTDATED),
    "gave up": (GAVE_UP_STATUS, "load failed"),
    "grammar": (500, "Grammar accept_token failed for req {rid}"),
}
"""Status and message of an engine's faults that are errors in the shape of SGLang's."""

HOST = "127.0.0.1"
_incarnations = itertools.count(1)


class ControlStub:
    """A ROUTER that answers through ``answers(message)``, a list of messages."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.incarnation = Incarnation(next(_incarnations))
        self.endpoint = f"tcp://{HOST}:{free_port()}"
        self.silent = False
        self.received: list[Any] = []
        self.known: list[Any] = []
        """Lists of members that it was told."""
        self.leader = Leader()
        self.refused: list[Any] = []
        """What a gateway has said that is to be obeyed no more."""
        self.client: bytes = b""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        stand_in_for(self._socket, self.endpoint, name)
        self._task = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        while True:
            self.client, frame = await self._socket.recv_multipart()
            if self.silent:
                continue
            message = decode(frame)
            if not self._is_present(message):
                self.refused.append(message)
                await self.push(Superseded(self.leader.term))
                if isinstance(message, KnownAgents | KnownEngines | ReadShare):
                    continue
            elif isinstance(message, KnownAgents | KnownEngines):
                self.known.append(message)
            elif not isinstance(message, Ping):
                self.received.append(message)
            for answer in self.answers(message):
                await self.push(answer)

    def _is_present(self, message: Any) -> bool:
        """Whether it is of the gateway to be obeyed, if it is of one."""
        match message:
            case ReadShare(plan=plan) | EnginePlan(id=plan):
                return self.leader.has_given(plan)
            case Ping(term=term) | KnownAgents(term=term) | KnownEngines(term=term) if term:
                return self.leader.heard(term)
        return True

    @property
    def heard(self) -> int:
        return self.known[-1].number if self.known else 0

    async def push(self, message: Any) -> None:
        await self._socket.send_multipart([self.client, encode(message)])

    async def push_raw(self, frame: bytes) -> None:
        await self._socket.send_multipart([self.client, frame])

    def answers(self, message: Any) -> list[Any]:
        raise NotImplementedError

    def got(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.received if isinstance(message, kind)]

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close(0)
        self._context.destroy(0)
