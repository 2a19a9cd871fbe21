"""Engines and agents that are made up, in one process: they cost the gateway what real ones do.

``python -m benchmarks.scale.fleet`` reads a :class:`Fleet` from a line of its stdin, says on a line
of its stdout where its engines are, and ends with its stdin.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio
from aiohttp import web

from common.block import BlockKey, BlockLayout, Namespace, TierName, block_keys
from common.ids import Incarnation
from common.loads import AgentLoad, EngineLoad, ModelBounds
from common.messages.codec import Message, decode, encode
from common.messages.fields import Ping
from common.messages.from_agents import AgentHello, AgentStatus, Announcement, Holding, ShareRead
from common.messages.from_engines import EngineHello, PlanAccepted
from common.messages.from_gateway import EnginePlan, KnownAgents, KnownEngines, ReadShare, Subscribe
from common.page_hashes import page_hashes
from common.samples import sample
from transfer.control.keys import Keys

HOST = "127.0.0.1"
NAMESPACE = Namespace("model", "1", "bfloat16", BlockLayout(64, 61, (73728,)))
BOUNDS = ModelBounds(vocabulary_tokens=1 << 18, context_tokens=1 << 18, prompt_tokens_max=1 << 18)
STATUS_S = 0.2
"""How often an agent at work says how it is."""
SAMPLES = [sample("engine_open_jobs", n) for n in range(40)]
"""About as many as a process reports."""
TOKEN_S = 0.005
"""Between two tokens of a stream: none comes with the next."""
TEXT = "some of the words of an answer " * 11
"""SGLang's events have all text so far: the mean of 176 tokens' is half of theirs."""


class Fleet(msgspec.Struct, frozen=True):
    """``folder``: of their control sockets. ``prompt``: the one whose blocks the store has."""

    folder: str
    secret: str
    prefill: int
    decode: int
    prompt: list[int]

    @property
    def engines(self) -> list[str]:
        return [f"p{n}" for n in range(self.prefill)] + [f"d{n}" for n in range(self.decode)]

    def endpoint(self, name: str) -> str:
        return f"ipc://{Path(self.folder) / name}"


def prompt_keys(prompt: Sequence[int]) -> list[BlockKey]:
    page_tokens = NAMESPACE.layout.page_tokens
    return block_keys(NAMESPACE.digest(), page_hashes(prompt, page_tokens))


class _Served:
    """A control socket."""

    def __init__(self, fleet: Fleet, name: str, context: zmq.asyncio.Context) -> None:
        self.name = name
        self.client = b""
        self._heard = 0
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, Keys(name, fleet.secret).private)
        self._socket.bind(fleet.endpoint(name))

    @property
    def heard(self) -> int:
        return self._heard

    async def serve(self) -> None:
        while True:
            self.client, frame = await self._socket.recv_multipart()
            message = decode(frame)
            if isinstance(message, KnownAgents | KnownEngines):
                self._heard = message.number
            for answer in self.answers(message):
                await self.push(answer)

    async def push(self, message: Message) -> None:
        await self._socket.send_multipart([self.client, encode(message)])

    def answers(self, message: Message) -> list[Message]:
        raise NotImplementedError


class _Engine(_Served):
    def answers(self, message: Message) -> list[Message]:
        match message:
            case Ping():
                return [self._hello()]
            case EnginePlan():
                return [PlanAccepted(message.id)]
        return []

    def _hello(self) -> EngineHello:
        role = "prefill" if self.name.startswith("p") else "decode"
        load = EngineLoad(
            engine=self.name,
            role=role,
            agent=f"agent-{self.name}",
            incarnation=Incarnation(1),
            group="",
            sequences=0,
            pending_tokens=0,
            context_tokens=0,
            free_tokens=4_000_000,
        )
        return EngineHello(load, NAMESPACE, 8998, BOUNDS, SAMPLES, self.heard)


class _Agent(_Served):
    """The first of them has the blocks of ``held`` on SSD."""

    def __init__(
        self, fleet: Fleet, name: str, context: zmq.asyncio.Context, held: list[BlockKey]
    ) -> None:
        super().__init__(fleet, name, context)
        self._held = held

    def answers(self, message: Message) -> list[Message]:
        match message:
            case Ping():
                return [AgentHello(self.name, Incarnation(1), "host:1"), self._status()]
            case Subscribe():
                changes = [Holding(key, TierName.SSD, True) for key in self._held]
                return [Announcement(Incarnation(1), 0, True, changes)]
            case ReadShare(plan=plan, keys=keys):
                read = {TierName.SSD: len(keys) * NAMESPACE.layout.block_bytes}
                return [ShareRead(plan, [True] * len(keys), read, 0.0, 0.0)]
        return []

    async def report(self) -> None:
        """For ever, as one at work does."""
        while True:
            await asyncio.sleep(STATUS_S)
            if self.client:
                await self.push(self._status())

    def _status(self) -> AgentStatus:
        queued = {TierName.SSD: int(time.monotonic() * 1e6) % 1000, TierName.REMOTE: 0}
        rates = {TierName.SSD: 5e9, TierName.REMOTE: 50e9}
        load = AgentLoad(self.name, Incarnation(1), queued, rates, 0, 1e9, 19_000, 19_000)
        return AgentStatus(load, SAMPLES, self.heard)


# ---- HTTP --------------------------------------------------------------------------------


def _event(rid: str, token: int) -> bytes:
    """In the shape of SGLang's ``/generate``."""
    meta = {
        "id": rid,
        "finish_reason": None,
        "prompt_tokens": 65536,
        "weight_version": "1",
        "total_retractions": 0,
        "completion_tokens": token,
        "cached_tokens": 64000,
        "cached_tokens_details": None,
        "dp_rank": None,
    }
    value = {"text": TEXT, "output_ids": [token], "meta_info": meta}
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class _Generate(msgspec.Struct):
    rid: str
    sampling_params: dict[str, int]


async def _prefilled(request: web.Request) -> web.StreamResponse:
    body = msgspec.json.decode(await request.read(), type=_Generate)
    return await _answer(request, body.rid, 1)


async def _decoded(request: web.Request) -> web.StreamResponse:
    body = msgspec.json.decode(await request.read(), type=_Generate)
    return await _answer(request, body.rid, body.sampling_params["max_new_tokens"])


async def _answer(request: web.Request, rid: str, tokens: int) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for token in range(tokens):
        await response.write(_event(rid, token))
        await asyncio.sleep(TOKEN_S)
    await response.write(b"data: [DONE]\n\n")
    return response


async def _info(request: web.Request) -> web.Response:
    return web.json_response({"model_path": "made up"})


async def _listen(role: str, count: int) -> list[str]:
    """URLs of so many engines."""
    app = web.Application(client_max_size=32 << 20)
    app.router.add_get("/model_info", _info)
    app.router.add_post("/generate", _prefilled if role == "prefill" else _decoded)
    runner = web.AppRunner(app)
    await runner.setup()
    for _ in range(count):
        await web.TCPSite(runner, HOST, 0).start()
    return [f"http://{HOST}:{address[1]}" for address in runner.addresses]


async def _run(fleet: Fleet) -> None:
    context = zmq.asyncio.Context()
    context.set(zmq.MAX_SOCKETS, 4096)
    urls = await _listen("prefill", fleet.prefill) + await _listen("decode", fleet.decode)
    keys, tasks = prompt_keys(fleet.prompt), []
    for engine in fleet.engines:
        agent = _Agent(fleet, f"agent-{engine}", context, keys)
        keys = []
        tasks += [_Engine(fleet, engine, context).serve(), agent.serve(), agent.report()]
    running = [asyncio.create_task(task) for task in tasks]
    print(msgspec.json.encode(urls).decode(), flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until whoever has started this is done
    for task in running:
        task.cancel()
    context.destroy(0)


def main() -> None:
    asyncio.run(_run(msgspec.json.decode(sys.stdin.readline(), type=Fleet)))


if __name__ == "__main__":
    main()
