"""The page is for everybody, as there is nothing in it; what it shows is for operators."""

from __future__ import annotations

import msgspec
from fastapi import FastAPI, Request, Response

from launch.gateway.dashboard.page import headers, page
from launch.gateway.doors.doors import DASHBOARD
from launch.gateway.errors import BadRequest
from launch.gateway.services import services_of

DIGITS_MAX = 15


def dashboard_routes(app: FastAPI) -> None:
    @app.get(DASHBOARD)
    async def dashboard() -> Response:
        return Response(page(), media_type="text/html; charset=utf-8", headers=headers())

    @app.get("/admin/history")
    async def history(request: Request) -> Response:
        """The last minutes, or what has come of them after a point."""
        after_ms = request.query_params.get("after_ms", "0")
        if not after_ms.isdecimal() or len(after_ms) > DIGITS_MAX:
            raise BadRequest("after_ms is a point's at_ms")
        view = services_of(request).history.view(int(after_ms))
        return Response(msgspec.json.encode(view), media_type="application/json")
