"""A gateway's registry for nodes to join: what it was told, and answers that a test chooses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from common.cluster import membership as m
from common.ids import Incarnation, PlanId


class StubRegistry:
    """Knows the leases that it has given since the last :meth:`forget`."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.refusals: list[web.Response] = []
        """Of the next requests, before anything else is looked at."""
        self.idle = False
        self.incarnation = 1000
        self.leases: set[str] = set()
        self.url = ""
        self.changed = asyncio.Event()
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> StubRegistry:
        app = web.Application()
        for path, kind, answer in (
            (m.JOIN, m.JoinRequest, self._join),
            (m.RENEW, m.Renewal, self._renew),
            (m.RESTART, m.RestartRequest, self._restart),
            (m.LEAVE, m.LeaveRequest, self._leave),
        ):
            app.router.add_post(path, self._route(kind, answer))
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    def forget(self) -> None:
        self.leases.clear()

    def of(self, kind: type) -> list[Any]:
        return [each for each in self.told if isinstance(each, kind)]

    async def until(self, holds: Callable[[], bool], timeout_s: float = 20) -> None:
        async def wait() -> None:
            while not holds():
                self.changed.clear()
                await self.changed.wait()

        await asyncio.wait_for(wait(), timeout_s)

    def _route(self, kind: type, answer: Callable[[Any], msgspec.Struct | None]) -> Any:
        async def serve(request: web.Request) -> web.Response:
            body = msgspec.json.decode(await request.read(), type=kind)
            self.told.append(body)
            self.changed.set()
            if self.refusals:
                return self.refusals.pop(0)
            if hasattr(body, "lease") and body.lease not in self.leases:
                return refusal(404, "unknown lease")
            return web.Response(body=msgspec.json.encode(answer(body)))

        return serve

    def _join(self, body: m.JoinRequest) -> m.Joined:
        lease = f"lease-number-{len(self.told)}"
        self.leases.add(lease)
        self.incarnation = max(self.incarnation, body.incarnation) + 1000
        name = body.name or "p7"
        incarnation = Incarnation(self.incarnation)
        return m.Joined(name, lease, incarnation, 3, {"agent-d0": "tcp://h:1"}, ["d0"])

    def _renew(self, body: m.Renewal) -> m.Renewed:
        idle = self.idle and body.state is m.State.DRAINING
        return m.Renewed(idle, 0, PlanId(77), Incarnation(self.incarnation))

    def _restart(self, body: m.RestartRequest) -> m.Restarted:
        self.incarnation = max(self.incarnation, body.ended) + 1000
        return m.Restarted(Incarnation(self.incarnation), 4)

    def _leave(self, body: m.LeaveRequest) -> m.Left:
        self.leases.discard(body.lease)
        return m.Left()


def refusal(status: int, sentence: str, **headers: str) -> web.Response:
    body = msgspec.json.encode({"error": {"message": sentence}})
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return web.Response(status=status, body=body, headers=named)
