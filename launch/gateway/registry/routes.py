"""HTTP of the registry: for nodes, with the join token; for operators, in the shapes of SGLang's
router."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec
from fastapi import FastAPI, Request, Response

from common.cluster.membership import (
    JOIN,
    LEAVE,
    RENEW,
    RESTART,
    JoinRequest,
    LeaveRequest,
    Renewal,
    RestartRequest,
)
from launch.gateway.body import decoded
from launch.gateway.registry.registry import Registry
from launch.gateway.registry.workers import WorkerRequest, Workers
from launch.gateway.services import body_of, services_of

T = TypeVar("T")

ACCEPTED_STATUS = 202


def membership_routes(app: FastAPI) -> None:
    """What nodes ask."""

    def route(path: str, kind: type[T], answer: Callable[[Registry, T], object]) -> None:
        async def asked(request: Request) -> Response:
            body = decoded(await body_of(request), kind)
            services = services_of(request)
            answered = answer(services.registry, body)
            services.plane.changed.set()
            return _json(answered)

        app.add_api_route(path, asked, methods=["POST"])

    route(JOIN, JoinRequest, Registry.join)
    route(RENEW, Renewal, Registry.renew)
    route(RESTART, RestartRequest, Registry.restart)
    route(LEAVE, LeaveRequest, Registry.leave)


def worker_routes(app: FastAPI) -> None:
    """Engines as the workers of SGLang's router."""

    @app.get("/workers")
    async def list_workers(request: Request) -> Response:
        return _json(_workers(request).listed())

    @app.get("/workers/{name}")
    async def worker(request: Request, name: str) -> Response:
        return _json(_workers(request).one(name))

    @app.post("/workers")
    async def add(request: Request) -> Response:
        return _accepted(_workers(request).add(decoded(await body_of(request), WorkerRequest)))

    @app.delete("/workers/{name}")
    async def remove(request: Request, name: str) -> Response:
        return _accepted(_workers(request).remove(name))

    @app.get("/list_workers")
    async def urls(request: Request) -> Response:
        return _json({"urls": _workers(request).urls()})

    @app.post("/add_worker")
    async def add_url(request: Request) -> Response:
        url = request.query_params.get("url", "")
        return _accepted(_workers(request).add(WorkerRequest(url)))

    @app.post("/remove_worker")
    async def remove_url(request: Request) -> Response:
        workers = _workers(request)
        return _accepted(workers.remove(workers.name_at(request.query_params.get("url", ""))))


def _workers(request: Request) -> Workers:
    services = services_of(request)
    own_url = str(request.base_url)
    return Workers(services.plane, services.registry, services.orders, own_url)


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _accepted(name: str) -> Response:
    return _json({"status": "accepted", "worker_id": name}, ACCEPTED_STATUS)
