"""Routes that engines answer as they are: one of them, or each."""

from __future__ import annotations

import msgspec
from fastapi import FastAPI, Request, Response

from common.json import JsonObject
from launch.gateway.body import decoded
from launch.gateway.errors import NoSuchRoute, RequestFailed
from launch.gateway.peers.engine_client import Call
from launch.gateway.request.checks import check_ids, check_limits
from launch.gateway.request.schema import DETOKENIZE, TABLES, TOKENIZE, decode_body
from launch.gateway.routes.table import ROUTES, Answers
from launch.gateway.services import body_of, services_of
from launch.gateway.weights.fan_out import Outcome

_METHODS = ["GET", "POST", "PUT", "DELETE"]
_NEW_NAMES = {
    "/get_model_info": "/model_info",
    "/get_server_info": "/server_info",
    "/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
}
"""SGLang's old names for routes still work, but with a warning in an engine's log."""
NOT_IMPLEMENTED_STATUS = 501
_SERVER_INFO = ("/server_info", "/get_server_info")


def routes_of_engines(app: FastAPI) -> None:
    """All but what changes weights."""
    handlers = {
        Answers.ANY: _any,
        Answers.ANY_TO_OPERATORS: _any,
        Answers.ALL: _all,
        Answers.NOBODY: _nobody,
    }
    own = dict.fromkeys(_SERVER_INFO, _server_info)
    for path, route in ROUTES.items():
        if (handler := own.get(path) or handlers.get(route.answers)) is not None:
            app.add_api_route(path, handler, methods=_METHODS)


async def _any(request: Request) -> Response:
    answer = await services_of(request).client.ask_any(await _call(request))
    return Response(answer.body, media_type=answer.content_type)


async def _server_info(request: Request) -> Response:
    """One engine's, but for what the cluster is as a whole: a server without P/D, with the ranks of
    all engines, which slime reads as ``num_gpus``."""
    services = services_of(request)
    answer = await services.client.ask_any(await _call(request))
    info = msgspec.json.decode(answer.body, type=dict[str, object])
    ranks = await services.weights.engines.ranks(services.weights.engines.in_rank_order())
    info |= {"disaggregation_mode": "null", "num_gpus": sum(ranks.values())}
    return Response(msgspec.json.encode(info), media_type=answer.content_type)


async def _all(request: Request) -> Response:
    """One engine's answer, if all have done it; else what each has said."""
    services = services_of(request)
    engines = [e for e in services.plane.members.engines.values() if not e.address.group]
    limit_s = services.config.request_timeout_s
    outcomes = await services.weights.engines.at_each(engines, await _call(request), limit_s)
    answers = [o.answer for o in outcomes.values() if o.answer is not None and o.is_done]
    if answers and len(answers) == len(outcomes):
        return Response(answers[0].body, media_type=answers[0].content_type)
    raise RequestFailed("; ".join(f"{name}: {_said(told)}" for name, told in outcomes.items()))


def _said(outcome: Outcome) -> str:
    if outcome.answer is None:
        return outcome.trouble
    return f"{outcome.answer.status} {outcome.answer.body[:500].decode(errors='replace')}"


async def _nobody(request: Request) -> Response:
    path: str = request.scope["route"].path
    raise NoSuchRoute(NOT_IMPLEMENTED_STATUS, request.scope["path"], ROUTES[path].why)


async def _call(request: Request) -> Call:
    """As it came; the fields of clients' routes are checked."""
    services, given = services_of(request), str(request.scope["path"])
    path = _NEW_NAMES.get(given, given)
    query: bytes = request.scope["query_string"]
    data = await body_of(request)
    body: JsonObject | None = None
    if path in TABLES:
        body = decode_body(path, data)
        check_limits(body, services.config.limits)
        check_ids(body, services.plane.members.bounds())
    elif data:
        body = decoded(data, JsonObject)
    return Call(request.method, path, body, query.decode("latin-1"))
