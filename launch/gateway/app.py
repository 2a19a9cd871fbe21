"""The OpenAI-compatible front door: its routes, and what lives as long as the process.

FastAPI and uvicorn, because SGLang itself brings them; one asyncio loop. The walk of a
request is in ``request/walk.py``; here are the routes and the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from common.cluster.membership import TOKEN_PURPOSE
from common.ids import PlanId
from common.json import JsonObject
from launch.gateway.admission import Client
from launch.gateway.body import decoded, read_body
from launch.gateway.config import GatewayConfig
from launch.gateway.dashboard.routes import dashboard_routes
from launch.gateway.doors.browsers import as_sent
from launch.gateway.doors.doors import ABORT, Doors
from launch.gateway.doors.refusals import Forbidden, Refusal
from launch.gateway.doors.visitor import visitor_of
from launch.gateway.errors import BadRequest, GatewayError, NoSuchRoute, NotFound, Unavailable
from launch.gateway.generate_probe import GenerateProbe
from launch.gateway.orders import Orders
from launch.gateway.peers.control_plane import ControlPlane
from launch.gateway.peers.membership import MemberNames
from launch.gateway.registry.routes import membership_routes, worker_routes
from launch.gateway.request.checks import check_ids, check_limits
from launch.gateway.request.parts import CHAT, COMPLETIONS, GENERATE
from launch.gateway.request.schema import DETOKENIZE, TOKENIZE, decode_body
from launch.gateway.request.serve import CLIENT_GONE_STATUS, error_response, serve
from launch.gateway.request.trace import HEADER
from launch.gateway.services import Services
from scheduler.policies import UnknownPolicy
from scheduler.scheduler import Scheduler
from transfer.control.keys import derived

log = logging.getLogger(__name__)

PLANS_PER_MS = 128
"""Plan numbers begin at the start time: a restarted gateway repeats none (48 bits last
until the year 2039)."""
PLAN_DIGITS_MAX = 15
"""Of 48 bits."""


class PolicyChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /admin/policy``."""

    path_policy: str


class DrainChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /admin/drain``; ``name`` is an engine's or an agent's."""

    name: str
    on: bool


class AbortRequest(msgspec.Struct, frozen=True):
    """Body of ``POST /abort_request``, as SGLang takes it. ``rid`` is a whole id: SGLang's takes
    all that begin alike."""

    rid: str = ""
    abort_all: bool = False


def create_app(config: GatewayConfig, run_folder: Path | None = None) -> FastAPI:
    """The whole gateway; it connects to its peers when the app starts.

    ``run_folder``: where operators' orders outlast this process.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        first_plan = PlanId(int(time.time() * 1000) * PLANS_PER_MS)
        scheduler = Scheduler(config.path_policy, config.scheduler, first_plan)
        plane = ControlPlane(config, scheduler)
        orders = Orders(scheduler, MemberNames(plane.members), run_folder)
        services = Services(config, scheduler, plane, orders)
        app.state.services = services
        app.state.generate_probe = GenerateProbe(services)
        services.start()
        yield
        await app.state.generate_probe.close()
        await services.close()

    app = FastAPI(lifespan=lifespan, title="DualPath", docs_url=None, redoc_url=None)
    app.add_exception_handler(GatewayError, _gateway_error)
    app.add_exception_handler(HTTPException, _no_such_route)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(Exception, _internal_error)
    _add_doors(app, config)
    _generating_routes(app)
    _model_routes(app)
    _health_routes(app)
    _admin_routes(app)
    _engine_routes(app)
    dashboard_routes(app)
    membership_routes(app)
    worker_routes(app)
    return app


def _add_doors(app: FastAPI, config: GatewayConfig) -> None:
    def refused(reason: str) -> None:
        app.state.services.metrics.refused.labels(reason).inc()

    app.add_middleware(
        Doors,
        bound=config.host,
        settings=config.doors,
        keys=config.keys,
        refused=refused,
        join_token=derived(config.control_secret, TOKEN_PURPOSE) if config.control_secret else "",
    )
    if config.doors.allowed_origins:  # what is added last comes first: it answers browsers' OPTIONS
        app.add_middleware(
            CORSMiddleware,
            allow_origins=as_sent(config.doors.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[HEADER],
        )


async def _gateway_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    if isinstance(error, Refusal):
        _services(request).metrics.refused.labels(error.reason).inc()
    return error_response(error)


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path: str = request.scope["path"]
    return error_response(NoSuchRoute(error.status_code, f"{request.method} {path}"))


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE_STATUS)


async def _internal_error(request: Request, error: Exception) -> Response:
    return error_response(GatewayError("internal error of the gateway"))  # Starlette logs it


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def _body(request: Request) -> bytes:
    return await read_body(request, _services(request).config.limits.body_bytes_max)


def _generating_routes(app: FastAPI) -> None:
    @app.post(CHAT)
    async def chat(request: Request) -> Response:
        return await serve(_services(request), CHAT, request)

    @app.post(COMPLETIONS)
    async def completions(request: Request) -> Response:
        return await serve(_services(request), COMPLETIONS, request)

    @app.api_route(GENERATE, methods=["POST", "PUT"])
    async def generate(request: Request) -> Response:
        return await serve(_services(request), GENERATE, request)

    @app.post(ABORT)
    async def abort_request(request: Request) -> Response:
        asked = decoded(await _body(request), AbortRequest)
        services, visitor = _services(request), visitor_of(request)
        if asked.abort_all and not visitor.is_operator:
            raise Forbidden("Only operators may abort all requests.", "operator")
        owner = Client.of({}, visitor.tenant, request.headers.get("authorization")).owner
        # Without a key of their own, operators are clients of this host too, with their own ids.
        anyones = visitor.is_operator and bool(services.config.keys.admin_api_keys)
        chosen = [
            walk
            for walk in services.walks.values()
            if asked.abort_all
            or (
                (anyones or walk.seat.owner == owner)
                and asked.rid in (walk.part.rid, walk.part.request_rid)
            )
        ]
        await asyncio.gather(*(walk.abort() for walk in chosen))
        return Response(status_code=200)


def _model_routes(app: FastAPI) -> None:
    async def forward(request: Request) -> Response:
        # SGLang's old name for it still works, with a warning in the engine's log.
        path: str = request.scope["path"].replace("/get_model_info", "/model_info")
        answer = await _services(request).client.ask_any("GET", path)
        return Response(answer.body, media_type=answer.content_type)

    async def forward_body(request: Request) -> Response:
        services, path = _services(request), request.scope["path"]
        body = decode_body(path, await _body(request))
        check_limits(body, services.config.limits)
        check_ids(body, services.plane.members.bounds())
        answer = await services.client.ask_any("POST", path, body)
        return Response(answer.body, media_type=answer.content_type)

    for path in (TOKENIZE, DETOKENIZE):
        app.add_api_route(path, forward_body, methods=["POST"])
    for path in ("/v1/models", "/v1/models/{model:path}", "/model_info", "/get_model_info"):
        app.add_api_route(path, forward, methods=["GET"])


def _health_routes(app: FastAPI) -> None:
    @app.get("/health")
    async def health(request: Request) -> Response:
        troubles = _services(request).plane.members.troubles()
        if troubles:
            return _json({"status": "unavailable", "reasons": troubles}, 503)
        return _json({"status": "ok"})

    @app.get("/health_generate")
    async def health_generate(request: Request) -> Response:
        await request.app.state.generate_probe.check()
        return _json({"status": "ok"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return Response(_services(request).metrics.text(), media_type="text/plain; version=0.0.4")


def _admin_routes(app: FastAPI) -> None:
    @app.api_route("/flush_cache", methods=["GET", "POST"])
    async def flush_cache(request: Request) -> Response:
        """Of the engines only: the store keeps its blocks."""
        failures = await _services(request).client.flush()
        if failures:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
            raise Unavailable(f"not flushed: {reasons}")
        return Response("Cache flushed.\n", media_type="text/plain")

    @app.get("/admin/cluster")
    async def cluster(request: Request) -> Response:
        return _json(_services(request).view())

    @app.post("/admin/policy")
    async def policy(request: Request) -> Response:
        asked = decoded(await _body(request), PolicyChange)
        services = _services(request)
        try:
            services.orders.set_policy(asked.path_policy)
        except UnknownPolicy as error:
            raise BadRequest(str(error)) from error
        return _json({"path_policy": asked.path_policy})

    @app.post("/admin/drain")
    async def drain(request: Request) -> Response:
        """Nothing new for an engine or an agent; what runs there finishes."""
        asked = decoded(await _body(request), DrainChange)
        services = _services(request)
        try:
            services.orders.drain(asked.name, asked.on)
        except KeyError as error:
            names = ", ".join(services.orders.names)
            raise NotFound(f"no engine or agent {asked.name!r}: there are {names}") from error
        log.info("drain name=%s on=%s", asked.name, asked.on)
        services.plane.changed.set()
        return _json({"name": asked.name, "draining": asked.on})

    @app.get("/admin/plan/{plan:path}")
    async def plan(request: Request, plan: str) -> Response:
        """Why a request went where it went, by the plan's number or the request's id."""
        scheduler, now = _services(request).scheduler, time.monotonic()
        is_number = plan.isdecimal() and len(plan) <= PLAN_DIGITS_MAX
        view = scheduler.explain(PlanId(int(plan)), now) if is_number else None
        view = view or scheduler.explain(plan, now)
        if view is None:
            kept = scheduler.options.decisions_kept
            raise NotFound(f"{plan} is no plan and no request id among the last {kept}")
        return _json(view)


def _engine_routes(app: FastAPI) -> None:
    @app.api_route("/admin/engine/{name}/{path:path}", methods=["GET", "POST"])
    async def engine(request: Request, name: str, path: str) -> Response:
        """Any route of SGLang's at one engine, such as its weight updates: engines themselves
        answer nobody but this gateway."""
        services = _services(request)
        if name not in services.client.members.engines:
            raise NotFound(f"no engine {name!r}")
        given = await _body(request)
        body = decoded(given, JsonObject) if given else None
        query: bytes = request.scope["query_string"]
        answer = await services.client.ask_one(
            name,
            request.method,
            f"/{path}",
            body,
            services.config.request_timeout_s,
            query.decode("latin-1"),
        )
        return Response(answer.body, answer.status, media_type=answer.content_type)
