"""What a gateway answers that is not the active one, and the route by which others copy it."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from launch.gateway.body import decoded, read_body
from launch.gateway.config import GatewayConfig
from launch.gateway.doors.browsers import READING
from launch.gateway.doors.doors import DASHBOARD, MEMBERSHIP
from launch.gateway.errors import Unavailable
from launch.gateway.standby.copy import COPY, CopyRequest
from launch.gateway.standby.standby import Standby

HOLD_S = 6.0
"""Requests that come while no gateway is active wait so long for this one to be."""
RETRY_S = 1
REQUEST_BYTES_MAX = 4096
_OPEN = ("/metrics", DASHBOARD, COPY)


class StandbyDoor:
    """ASGI middleware: lets everything pass while this gateway is active."""

    def __init__(self, app: ASGIApp, config: GatewayConfig) -> None:
        self._app = app
        self._held_max = config.requests_max
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            standby: Standby = scope["app"].state.standby
            if not standby.leadership.is_active and not self._is_open(scope):
                answer = await self._answer(standby, scope["path"])
                if answer is not None:
                    await answer(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    @staticmethod
    def _is_open(scope: Scope) -> bool:
        """What shows a gateway as it is, and changes nothing."""
        path: str = scope["path"]
        is_shown = path.startswith(("/admin/", "/workers")) and scope["method"] in READING
        return path in _OPEN or (is_shown and not path.startswith("/admin/engine/"))

    async def _answer(self, standby: Standby, path: str) -> Response | None:
        """None: it is the active one by now."""
        if path == "/health":
            view = {"status": standby.leadership.standing.value, "active": standby.active_url}
            return _response(msgspec.json.encode(view))
        if path.startswith(MEMBERSHIP):
            standby.asked_by_node()
        elif await self._becomes_active(standby):
            return None
        where = f": ask {standby.active_url}" if standby.active_url else ""
        standing = standby.leadership.standing.value
        refusal = Unavailable(f"this gateway is not the active one, but {standing}{where}", RETRY_S)
        return _response(refusal.body(), refusal.headers())

    async def _becomes_active(self, standby: Standby) -> bool:
        """Waits for it, if no other is."""
        if not standby.may_take_over or self._held >= self._held_max:
            return False
        self._held += 1
        try:
            await asyncio.wait_for(standby.leadership.began.wait(), HOLD_S)
        except TimeoutError:
            return False
        finally:
            self._held -= 1
        return True


def copy_route(app: FastAPI) -> None:
    """For other gateways."""

    @app.post(COPY)
    async def copy(request: Request) -> Response:
        standby: Standby = request.app.state.standby
        decoded(await read_body(request, REQUEST_BYTES_MAX), CopyRequest)
        return Response(msgspec.json.encode(standby.copy()), media_type="application/json")


def _response(body: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(body, 503, headers=headers, media_type="application/json")
