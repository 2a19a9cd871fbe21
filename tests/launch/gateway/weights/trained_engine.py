"""A stub engine whose weights are named as an engine's are, and that takes a trainer's calls."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from common.messages.from_gateway import CommitWeights
from engine.weights import FolderDigested, Weights
from tests.launch.gateway.agent_stub import NAMESPACE
from tests.launch.gateway.stubs import StubEngine

CALLS = (
    *("pause_generation", "continue_generation", "begin_weight_update", "end_weight_update"),
    *("update_weights_from_disk", "update_weights_from_tensor", "update_weights_from_distributed"),
    *("update_weights_from_ipc", "update_weight_version", "init_weights_update_group"),
    *("destroy_weights_update_group", "release_memory_occupation", "resume_memory_occupation"),
    *("weights_checker", "load_lora_adapter"),
)
NEED_SESSION = ("update_weights_from_tensor", "update_weights_from_distributed")


class TrainedEngine(StubEngine):
    """``ranks`` of it hold weights. What is in ``refuses`` it answers with 400; ``dying`` at a call
    it ends."""

    def __init__(self, name: str, role: str, rooms: dict[int, asyncio.Event]) -> None:
        super().__init__(name, role, rooms)
        self.ranks = 1
        self.calls: list[tuple[str, Any]] = []
        self.refuses: set[str] = set()
        self.dying = ""
        self.kv_left = False
        """KV of older weights stays at an update."""
        self.holds: asyncio.Event | None = None
        """An update waits for it."""
        self.weights = Weights(NAMESPACE, name)

    def paths(self) -> list[str]:
        """What it was called, in order."""
        return [path for path, _ in self.calls]

    def hello(self) -> Any:
        self.namespace = self.weights.namespace
        return msgspec.structs.replace(super().hello(), weights=self.weights.state)

    def answers(self, message: Any) -> list[Any]:
        if isinstance(message, CommitWeights):
            self.weights.heard(message)
            return []
        return super().answers(message)

    def add_routes(self, app: web.Application) -> None:
        for path in CALLS:
            app.router.add_route("*", f"/{path}", self._called)
        app.router.add_get("/server_info", self._server_info)

    async def restart(self) -> None:
        self.weights = Weights(NAMESPACE, self.name)
        self.dying = ""
        await super().restart()

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response({"tp_size": self.ranks, "pp_size": 1})

    async def _flush(self, request: web.Request) -> web.Response:
        self.kv_left = False
        self.weights.flushed()
        return await super()._flush(request)

    async def _called(self, request: web.Request) -> web.Response:
        path = request.path[1:]
        body = await request.json() if request.can_read_body else None
        self.calls.append((path, body))
        if self.holds is not None and path.startswith("update"):
            await self.holds.wait()
        if path == self.dying:
            self.deaths.append(asyncio.create_task(self.die()))
            await asyncio.sleep(60)
        is_refused = path in self.refuses
        if path in NEED_SESSION and not self.weights.state.in_session:
            is_refused = True
        if is_refused:
            return web.json_response({"success": False, "message": f"no {path}"}, status=400)
        self._write(path, body or {})
        return web.json_response({"success": True, "message": "Success", "status": "ok"})

    def _write(self, path: str, body: dict[str, Any]) -> None:
        """What :mod:`engine.sglang.weights.update_hooks` hears of SGLang."""
        is_clean = not self.kv_left
        if path in ("begin_weight_update", "end_weight_update"):
            self.weights.session(path.startswith("begin"), is_clean)
        elif path == "update_weight_version":
            self.weights.changed(body["new_version"], is_clean)
        elif path.startswith("update"):
            self.weights.changed(body.get("weight_version"), is_clean)
        if path == "update_weights_from_disk":
            digest = f"digest of {body['model_path']}"
            self.weights.heard(FolderDigested(self.weights.state.changes, digest))
