"""The OpenAI-compatible front door: its routes, and what lives as long as the process.

FastAPI and uvicorn, because SGLang itself brings them; one asyncio loop. The walk of a
request is in ``request/walk.py``; here are the routes and the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
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
from launch.gateway.body import decoded
from launch.gateway.config import GatewayConfig
from launch.gateway.dashboard.routes import dashboard_routes
from launch.gateway.doors.browsers import as_sent
from launch.gateway.doors.doors import ABORT, Doors
from launch.gateway.doors.refusals import Forbidden, Refusal
from launch.gateway.doors.visitor import authorization_of, visitor_of
from launch.gateway.errors import BadRequest, GatewayError, NoSuchRoute, NotFound, Unavailable
from launch.gateway.generate_probe import GenerateProbe
from launch.gateway.orders import Orders
from launch.gateway.peers.control_plane import ControlPlane
from launch.gateway.peers.engine_client import Call
from launch.gateway.peers.membership import MemberNames
from launch.gateway.registry.routes import membership_routes, worker_routes
from launch.gateway.request.parts import GENERATE, GENERATING
from launch.gateway.request.serve import CLIENT_GONE_STATUS, error_response, serve
from launch.gateway.request.trace import HEADER
from launch.gateway.routes.of_engines import routes_of_engines
from launch.gateway.services import Services, body_of, services_of
from launch.gateway.standby.door import StandbyDoor, copy_route
from launch.gateway.standby.leadership import Leadership
from launch.gateway.standby.standby import Standby
from launch.gateway.weights.routes import weight_routes
from scheduler.policies import UnknownPolicy
from scheduler.scheduler import Scheduler
from transfer.control.keys import derived

log = logging.getLogger(__name__)

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


def create_app(
    config: GatewayConfig,
    run_folder: Path | None = None,
    on_superseded: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The whole gateway; it connects to its peers when the app starts.

    ``run_folder``: where operators' orders outlast this process. ``on_superseded``: called when
    another gateway has taken over, and this one has ended its requests.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        scheduler = Scheduler(config.path_policy, config.scheduler)
        plane = ControlPlane(config, scheduler, Leadership(scheduler, not config.standby_of))
        orders = Orders(scheduler, MemberNames(plane.members), run_folder)
        services = Services(config, scheduler, plane, orders)
        app.state.services = services
        app.state.generate_probe = GenerateProbe(services)
        services.start()
        standby = Standby(services, on_superseded)
        app.state.standby = standby
        standby.start()
        yield
        await standby.close()
        await app.state.generate_probe.close()
        await services.close()

    app = FastAPI(lifespan=lifespan, title="DualPath", openapi_url=None)
    app.add_exception_handler(GatewayError, _gateway_error)
    app.add_exception_handler(HTTPException, _no_such_route)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(Exception, _internal_error)
    app.add_middleware(StandbyDoor, config=config)
    _add_doors(app, config)
    _generating_routes(app)
    routes_of_engines(app)
    _health_routes(app)
    _admin_routes(app)
    _engine_routes(app)
    dashboard_routes(app)
    weight_routes(app)
    membership_routes(app)
    worker_routes(app)
    copy_route(app)
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
        services_of(request).metrics.refused.labels(error.reason).inc()
    return error_response(error)


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path: str = request.scope["path"]
    return error_response(NoSuchRoute(error.status_code, f"{request.method} {path}"))


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE_STATUS)


async def _internal_error(request: Request, error: Exception) -> Response:
    return error_response(GatewayError("internal error of the gateway"))  # Starlette logs it


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _generating_routes(app: FastAPI) -> None:
    async def generate(request: Request) -> Response:
        return await serve(services_of(request), request.scope["path"], request)

    for path in GENERATING:
        methods = ["POST", "PUT"] if path == GENERATE else ["POST"]
        app.add_api_route(path, generate, methods=methods)

    @app.post(ABORT)
    async def abort_request(request: Request) -> Response:
        asked = decoded(await body_of(request), AbortRequest)
        services, visitor = services_of(request), visitor_of(request)
        if asked.abort_all and not visitor.is_operator:
            raise Forbidden("Only operators may abort all requests.", "operator")
        owner = Client.of({}, visitor.tenant, authorization_of(request)).owner
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


def _health_routes(app: FastAPI) -> None:
    @app.get("/health")
    async def health(request: Request) -> Response:
        troubles = services_of(request).plane.members.troubles()
        if troubles:
            return _json({"status": "unavailable", "reasons": troubles}, 503)
        version = services_of(request).weights.view()["version"]
        return _json({"status": "ok", "weight_version": version})

    app.add_api_route("/ready", health, methods=["GET"])

    @app.get("/ping")
    async def ping() -> Response:
        """This process lives, as SageMaker asks."""
        return Response(status_code=200)

    @app.get("/v1/loads")
    async def loads(request: Request) -> Response:
        """The requests that are here, in SGLang's words: what waits for nobody has ended."""
        admission = services_of(request).admission
        running = admission.admitted - admission.queued
        counts = {"dp_rank": 0, "num_running_reqs": running, "num_waiting_reqs": admission.queued}
        return _json({"loads": [counts]})

    @app.get("/health_generate")
    async def health_generate(request: Request) -> Response:
        await request.app.state.generate_probe.check()
        return _json({"status": "ok"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return Response(services_of(request).metrics.text(), media_type="text/plain; version=0.0.4")


def _admin_routes(app: FastAPI) -> None:
    @app.api_route("/flush_cache", methods=["GET", "POST"])
    async def flush_cache(request: Request, timeout: float = 0.0) -> Response:
        """Of the engines only: the store keeps its blocks. ``timeout``: seconds for requests to
        end, as at SGLang."""
        longest_s = services_of(request).config.request_timeout_s
        if not 0 <= timeout <= longest_s:
            raise BadRequest(f"timeout is to be 0 to {longest_s:g} s.", "timeout")
        failures = await services_of(request).client.flush(timeout)
        if failures:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
            raise Unavailable(f"not flushed: {reasons}")
        return Response("Cache flushed.\n", media_type="text/plain")

    @app.get("/admin/cluster")
    async def cluster(request: Request) -> Response:
        return _json(services_of(request).view())

    @app.post("/admin/policy")
    async def policy(request: Request) -> Response:
        asked = decoded(await body_of(request), PolicyChange)
        services = services_of(request)
        try:
            services.orders.set_policy(asked.path_policy)
        except UnknownPolicy as error:
            raise BadRequest(str(error)) from error
        return _json({"path_policy": asked.path_policy})

    @app.post("/admin/drain")
    async def drain(request: Request) -> Response:
        """Nothing new for an engine or an agent; what runs there finishes."""
        asked = decoded(await body_of(request), DrainChange)
        services = services_of(request)
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
        scheduler, now = services_of(request).scheduler, time.monotonic()
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
        services = services_of(request)
        if name not in services.client.members.engines:
            raise NotFound(f"no engine {name!r}")
        given = await body_of(request)
        body = decoded(given, JsonObject) if given else None
        query: bytes = request.scope["query_string"]
        call = Call(request.method, f"/{path}", body, query.decode("latin-1"))
        answer = await services.client.ask_one(name, call, services.config.request_timeout_s)
        return Response(answer.body, answer.status, media_type=answer.content_type)
