"""SGLang's routes for weights, under its names: one call here is one at every engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response

from common.json import JsonObject
from launch.gateway.body import decoded
from launch.gateway.errors import GatewayError
from launch.gateway.peers.engine_client import HttpAnswer
from launch.gateway.services import body_of, services_of
from launch.gateway.weights.fan_out import as_json
from launch.gateway.weights.update import WeightUpdate

Work = Callable[[WeightUpdate, str, JsonObject], Awaitable[HttpAnswer]]


async def _at_all(update: WeightUpdate, path: str, body: JsonObject) -> HttpAnswer:
    return await update.engines.at_all(path, body)


async def _adapter(update: WeightUpdate, path: str, body: JsonObject) -> HttpAnswer:
    await update.engines.check_tensors(body)
    return await update.engines.at_all(path, body)


async def _init_group(update: WeightUpdate, path: str, body: JsonObject) -> HttpAnswer:
    return await update.groups.init(path, body)


async def _destroy_group(update: WeightUpdate, path: str, body: JsonObject) -> HttpAnswer:
    return await update.groups.destroy(path, body)


async def _version(update: WeightUpdate, path: str, body: JsonObject) -> HttpAnswer:
    return as_json(200, {"weight_version": update.view()["version"]})


_ROUTES: dict[str, Work] = {
    "/pause_generation": WeightUpdate.pause,
    "/continue_generation": WeightUpdate.resume,
    "/begin_weight_update": WeightUpdate.begin,
    "/end_weight_update": WeightUpdate.end,
    "/update_weights_from_disk": WeightUpdate.update,
    "/update_weights_from_tensor": WeightUpdate.update,
    "/update_weights_from_distributed": WeightUpdate.update,
    "/update_weights_from_ipc": WeightUpdate.update,
    "/update_weight_version": WeightUpdate.update,
    "/init_weights_update_group": _init_group,
    "/destroy_weights_update_group": _destroy_group,
    "/release_memory_occupation": WeightUpdate.release_memory,
    "/resume_memory_occupation": WeightUpdate.resume_memory,
    "/weights_checker": _at_all,
    "/load_lora_adapter": _at_all,
    "/load_lora_adapter_from_tensors": _adapter,
    "/unload_lora_adapter": _at_all,
    "/get_weight_version": _version,
}
_ALSO_GET = {
    *("/release_memory_occupation", "/resume_memory_occupation"),
    *("/weights_checker", "/get_weight_version"),
}
"""As at SGLang; the last one is slime's."""


def weight_routes(app: FastAPI) -> None:
    """What a trainer calls."""

    def route(path: str, work: Work) -> None:
        async def asked(request: Request) -> Response:
            given = await body_of(request)
            body = decoded(given, JsonObject) if given.strip() not in (b"", b"null") else {}
            try:
                answer = await work(services_of(request).weights, path, body)
            except GatewayError as error:  # in the shape that trainers know from SGLang
                answer = as_json(error.status, {"success": False, "message": str(error)})
            return Response(answer.body, answer.status, media_type=answer.content_type)

        methods = ["GET", "POST"] if path in _ALSO_GET else ["POST"]
        app.add_api_route(path, asked, methods=methods)

    for path, work in _ROUTES.items():
        route(path, work)
