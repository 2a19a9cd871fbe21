"""Stand-ins for engines and agents that speak their HTTP and control protocols.

They live in the test's own loop. An engine "generates" the words of ``WORDS``; the
decode side answers only once the prefill side has seen the same bootstrap room, and
both refuse a request whose plan they have not accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import uvicorn
from aiohttp import ClientSession, web

from common.block import BlockKey
from common.cluster.membership import EngineAddress
from common.ids import (
    FIELDS_HEADER,
    INPUT_IDS_HEADER,
    PROMPT_IDS_HEADER,
    RECORD_HEADER,
    Incarnation,
)
from common.loads import EngineLoad, ModelBounds
from common.messages.fields import Ping
from common.messages.from_engines import EngineEnds, EngineHello, PlanAccepted, PlanRefused
from common.messages.from_gateway import EnginePlan
from common.samples import sample
from launch.gateway.app import create_app
from launch.gateway.config import GatewayConfig
from launch.gateway.listening import listen
from launch.gateway.request.parts import GENERATING, MESSAGES, RESPONSES
from scheduler.options import SchedulerOptions
from tests.common.ports import free_port
from tests.control import SECRET
from tests.launch.gateway import control_stub
from tests.launch.gateway.agent_stub import NAMESPACE, StubAgent
from tests.launch.gateway.control_stub import REFUSALS, ControlStub
from tests.launch.gateway.request.stub_answers import (
    WORDS,
    named_events,
    usage_of,
    whole_answer,
)

BOUNDS = ModelBounds(vocabulary_tokens=1 << 21, context_tokens=4096, prompt_tokens_max=4000)


class StubEngine(ControlStub):
    """``faults`` are taken one a request: "500", "400", "named", "close", "abort" or "hang". While
    ``tokenizing`` is not set, there is no answer from ``/v1/tokenize``."""

    def __init__(self, name: str, role: str, rooms: dict[int, asyncio.Event]) -> None:
        super().__init__(name)
        self.role = role
        self.agent = "node-p" if role == "prefill" else "node-d"
        self.port = free_port()
        self.faults: list[str] = []
        self.word_delay_s = 0.0
        self.words = WORDS
        self.tokenizing: asyncio.Event | None = None
        self.break_after_words = -1
        self.namespace = NAMESPACE
        self.load_changes: dict[str, Any] = {}
        self.samples = [sample("engine_kv_wait_seconds_total", 2, layer="0")]
        self.bodies: list[dict[str, Any]] = []
        self.fields: list[str | None] = []
        self.asked_for: list[set[str]] = []
        """Of each body, the headers that go with a recorded turn."""
        """Of which no place is in the body."""
        self.traceparents: list[str | None] = []
        """Which they came with."""
        self.aborted: list[str] = []
        self.flushed, self.flush_query, self.frozen = 0, "", 0
        self.authorization = ""
        """Of the last request to tokenise."""
        self.dies_of, self.last_words = "", True
        """A text in the body of a request that ends it, and whether it says so, of all that are"""
        self.at_work: list[str] = []
        self.deaths: list[asyncio.Task[None]] = []
        self._rooms = rooms
        self._runner: web.AppRunner | None = None

    def answers(self, message: Any) -> list[Any]:
        match message:
            case Ping():
                return [self.hello()]
            case EnginePlan():
                if not self.leader.has_given(message.id):
                    return [PlanRefused(message.id, "another gateway")]
                if message.namespace_digest != self.hello().namespace.digest():
                    return [self.hello(), PlanRefused(message.id, "other weights", stale=True)]
                return [PlanAccepted(message.id)]
        return []

    def hello(self) -> EngineHello:
        load = EngineLoad(
            engine=self.name,
            role=self.role,
            agent=self.agent,
            incarnation=self.incarnation,
            group="",
            sequences=0,
            pending_tokens=0,
            context_tokens=0,
            free_tokens=100_000,
        )
        load = msgspec.structs.replace(load, **self.load_changes)
        return EngineHello(
            load, self.namespace, 8998, BOUNDS, self.samples, self.heard, self.leader.present_term
        )

    # ---- HTTP -------------------------------------------------------------------------

    async def start_http(self) -> None:
        app = web.Application()
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/v1/models", self._model_info)
        app.router.add_post("/v1/tokenize", self._tokenize)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_post("/flush_cache", self._flush)
        app.router.add_post("/freeze_gc", self._freeze)
        for path in GENERATING:
            app.router.add_post(path, self._generate)
        self.add_routes(app)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, control_stub.HOST, self.port).start()

    def add_routes(self, app: web.Application) -> None:
        """Of a test of its own."""

    async def die(self) -> None:
        """As a process that has raised an error, or was killed."""
        if self.last_words:
            await self.push(EngineEnds(self.incarnation, self.at_work, "an error"))
        self.silent = True
        await self.close_http()

    async def restart(self) -> None:
        """As a process anew."""
        self.incarnation = Incarnation(self.incarnation + 1000)
        self.silent, self.at_work = False, []
        await self.start_http()

    async def close(self) -> None:
        await super().close()
        await self.close_http()

    async def close_http(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _model_info(self, request: web.Request) -> web.Response:
        if self.silent:
            await asyncio.sleep(60)
        return web.json_response({"model_path": "stub"})

    async def _flush(self, request: web.Request) -> web.Response:
        self.flushed, self.flush_query = self.flushed + 1, request.rel_url.raw_query_string
        return web.Response(text="ok")

    async def _freeze(self, request: web.Request) -> web.Response:
        if self.faults.pop(0) if self.faults else "":
            return web.json_response({"message": "out of order"}, status=500)
        self.frozen += 1
        return web.json_response({"success": True})

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["rid"])
        return web.Response()

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.authorization = request.headers.get("authorization", "")
        if self.tokenizing is not None:
            await self.tokenizing.wait()
        if body.get("stream"):
            return web.json_response({"message": "does not support streaming"}, status=501)
        if "messages" in body:
            if not body["messages"]:
                error = {"object": "error", "message": "Messages cannot be empty.", "code": 400}
                return web.json_response(error, status=400)
            text = "".join(message["content"] for message in body["messages"])
            return web.json_response({"tokens": [ord(c) for c in text], "count": 1})
        return web.json_response({"tokens": [[ord(c) for c in t] for t in body["prompt"]]})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if PROMPT_IDS_HEADER in request.headers:
            messages = body.get("messages") or body["input"]
            text = "".join(message["content"] for message in messages)
            return web.json_response({"tokens": [ord(c) for c in text]})
        self.bodies.append(body)
        self.fields.append(request.headers.get(FIELDS_HEADER))
        turns = (INPUT_IDS_HEADER, RECORD_HEADER)
        self.asked_for.append({name for name in turns if name in request.headers})
        self.traceparents.append(request.headers.get("traceparent"))
        assert body["rid"] in [plan.rid for plan in self.got(EnginePlan)]
        fault = self.faults.pop(0) if self.faults else ""
        if self.dies_of and self.dies_of in json.dumps(body):
            self.at_work.append(body["rid"])
            self.deaths.append(asyncio.create_task(self.die()))
            fault = "hang"
        if fault == "close":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if fault == "hang":
            await asyncio.sleep(60)
        if fault == "ordered late":
            while body["rid"] not in self.aborted:
                await asyncio.sleep(0.02)
            error = {"message": "... Aborted by AbortReq.", "code": 500}
            return web.json_response(error, status=500)
        if fault == "abort" and not body.get("stream"):
            fault = "load"
        if fault in REFUSALS:
            status, message = REFUSALS[fault]
            error = {"object": "error", "message": message.format(**body), "code": status}
            return web.json_response(error, status=status)
        room = self._rooms.setdefault(body["bootstrap_room"], asyncio.Event())
        if self.role == "prefill":
            room.set()
        await room.wait()
        if body.get("stream"):
            return await self._stream(request, body, fault)
        return web.json_response(whole_answer(self.role, request.path, body, fault))

    async def _stream(
        self, request: web.Request, body: dict[str, Any], fault: str
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)

        async def send(value: Any) -> None:
            data = value if isinstance(value, str) else json.dumps(value)
            await response.write(f"data: {data}\n\n".encode())

        if request.path in (MESSAGES, RESPONSES):
            for event in named_events(request.path, body, fault):
                await response.write(event)
            if fault == "break":
                assert request.transport is not None
                request.transport.abort()
            return response
        if fault == "abort":
            await send({"error": {"message": "load failed", "code": 503}})
            await send("[DONE]")
            return response
        common = {"id": body["rid"], "object": "chunk", "model": "stub"}
        delta: dict[str, Any] = {"role": "assistant", "content": ""}
        await send({**common, "choices": [{"index": 0, "delta": delta}]})
        for position, word in enumerate(self.words):
            if position == self.break_after_words:
                assert request.transport is not None
                request.transport.abort()
                return response
            await send({**common, "choices": [{"index": 0, "delta": {"content": word}}]})
            await asyncio.sleep(self.word_delay_s)
        finish = {"index": 0, "delta": {}, "finish_reason": "length"}
        await send({**common, "choices": [finish]})
        if (body.get("stream_options") or {}).get("include_usage"):
            await send({**common, "choices": [], "usage": usage_of(body)})
        await send("[DONE]")
        return response


class StubCluster:
    """A gateway in front of stubs: P engines on node ``node-p``, D engines on ``node-d``."""

    def __init__(
        self,
        prefills: int,
        decodes: int,
        heartbeat_timeout_s: float = 5.0,
        engine: type[StubEngine] = StubEngine,
        **config: Any,
    ) -> None:
        self.rooms: dict[int, asyncio.Event] = {}
        self.agents = {name: StubAgent(name) for name in ("node-p", "node-d")}
        self.prefills = [engine(f"p{i}", "prefill", self.rooms) for i in range(prefills)]
        self.decodes = [engine(f"d{i}", "decode", self.rooms) for i in range(decodes)]
        self.config = GatewayConfig(
            host="127.0.0.1",
            port=free_port(),
            agents={name: agent.endpoint for name, agent in self.agents.items()},
            engines=[self.address_of(engine) for engine in self.engines],
            control_secret=SECRET,
            scheduler=SchedulerOptions(heartbeat_timeout_s=heartbeat_timeout_s),
            **config,
        )
        self.others: list[asyncio.Task[Any]] = []
        """Requests beside the one that a test watches."""
        self.app = create_app(self.config)
        self._serving = uvicorn.Config(
            self.app, port=self.config.port, log_level="warning", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(self._serving)
        self.http: ClientSession
        self._ending = contextlib.AsyncExitStack()
        """What of it has begun, also where the rest of its start failed."""
        for stub in (*self.agents.values(), *self.engines):
            self._ending.push_async_callback(stub.close)

    @property
    def engines(self) -> list[StubEngine]:
        return [*self.prefills, *self.decodes]

    @property
    def services(self) -> Any:
        return self.app.state.services

    def connections(self) -> set[Any]:
        """Of clients to the gateway that are busy with a request."""
        busy: set[Any] = self._server.server_state.connections
        return {one for one in busy if one.cycle and not one.cycle.response_complete}

    def walks_named(self, rid: str) -> list[Any]:
        return [walk for (_, name), walk in self.services.walks.items() if name == rid]

    def address_of(self, engine: StubEngine) -> EngineAddress:
        return EngineAddress(
            name=engine.name,
            role=engine.role,
            agent=engine.agent,
            http=f"http://127.0.0.1:{engine.port}",
            control=engine.endpoint,
            bootstrap_host="127.0.0.1",
        )

    async def start(self) -> None:
        for engine in self.engines:
            await engine.start_http()
        with contextlib.suppress(AttributeError):  # uvicorn would take the test's signals
            self._server.capture_signals = contextlib.nullcontext  # type: ignore
        listening = [listen(self._serving, self.config.client_stall_s)]
        serving = asyncio.create_task(self._server.serve(listening))
        self._ending.push_async_callback(self._end_server, serving)
        self.http = ClientSession(f"http://127.0.0.1:{self.config.port}")
        self._ending.push_async_callback(self.http.close)
        await self.until(lambda: self._server.started)
        await self.until(self._ready)
        # In the order in which equals are chosen: that of their first reports.
        row_of = self.services.scheduler.state.engines.row_of
        for engines in (self.prefills, self.decodes):
            engines.sort(key=lambda engine: row_of[engine.name])

    def _ready(self) -> bool:
        members = self.services.plane.members
        known = self.services.scheduler.state
        return (
            len(members.live_engines()) == len(self.engines)
            and len(known.engines.names) == len(self.engines)
            and all(agent.synced for agent in members.agents.values())
            and len(known.agents.names) == len(self.agents)
        )

    async def announce(self, agent: str, keys: list[BlockKey]) -> None:
        """Have an agent hold these blocks, and the gateway know."""
        stub, directory = self.agents[agent], self.services.scheduler.directory
        stub.held += keys
        await stub.push(stub.announcement(keys, snapshot=False))
        holders = frozenset([agent])
        await self.until(
            lambda: sum(run.blocks for run in directory.lookup(keys, holders)) == len(keys)
        )

    async def until(self, condition: Any, timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.02)

    async def _end_server(self, serving: asyncio.Task[None]) -> None:
        self._server.should_exit = True
        await serving

    async def stop(self) -> None:
        await self._ending.aclose()


@contextlib.asynccontextmanager
async def running_cluster(
    prefills: int = 1, decodes: int = 1, **config: Any
) -> AsyncIterator[StubCluster]:
    cluster = StubCluster(prefills, decodes, **config)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.stop()
