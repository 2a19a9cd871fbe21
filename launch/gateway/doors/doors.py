"""The first that looks at a request: is it from where it may be from, and with whose key?"""

from __future__ import annotations

import logging
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from launch.gateway.doors.browsers import READING, BrowserRules, host_of, is_loopback
from launch.gateway.doors.keys import ApiKey, Keyring
from launch.gateway.doors.refusals import Forbidden, Refusal, Unauthorized
from launch.gateway.doors.settings import DoorKeys, DoorSettings
from launch.gateway.doors.visitor import Visitor, authorization_of
from launch.gateway.routes.table import CHANGING_STATE, OPERATORS

log = logging.getLogger(__name__)

DASHBOARD = "/dashboard"
OPEN = ("/health", "/health_generate", "/ready", "/ping", "/metrics", DASHBOARD)
"""For probes and Prometheus, as SGLang's: they need no key and say nothing of a request. Nor does
the dashboard's page, which asks operators' routes for what it shows."""
ABORT = "/abort_request"
"""For clients, of their own requests; for operators, of all."""
_OF_A_PROXY = ("forwarded", "via", "x-forwarded-for", "x-real-ip")


MEMBERSHIP = "/membership/"
"""Begins the routes for the cluster's own nodes."""
_WORKERS = ("/workers", "/list_workers", "/add_worker", "/remove_worker")


def is_operators(path: str) -> bool:
    """Whether a route is for operators alone."""
    if path in _WORKERS or path.startswith(("/workers/", "/dumper/")) or path in OPERATORS:
        return True
    return path == "/flush_cache" or path == "/admin" or path.startswith("/admin/")


class Doors:
    """ASGI middleware. ``refused``: told the reason of each refusal."""

    def __init__(
        self,
        app: ASGIApp,
        bound: str,
        settings: DoorSettings,
        keys: DoorKeys,
        refused: Callable[[str], None],
        join_token: str = "",
    ) -> None:
        """``join_token``: what nodes have to show; empty: none is let in."""
        self._app = app
        self._browsers = BrowserRules(bound, settings.allowed_hosts, settings.allowed_origins)
        self._clients = Keyring(keys.api_keys)
        self._operators = Keyring(keys.admin_api_keys)
        self._nodes = Keyring((ApiKey("node", join_token),) if join_token else ())
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            try:
                request.state.visitor = self._let_in(request)
            except Refusal as refusal:
                self._refused(refusal.reason)
                client = request.client.host if request.client else ""
                log.info("refused client=%s reason=%s", client, refusal.reason)
                answer = Response(refusal.body(), refusal.status, refusal.headers())
                answer.headers["content-type"] = refusal.content_type
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _let_in(self, request: Request) -> Visitor:
        path: str = request.scope["path"]  # a URL would be made of what Host says
        if path in OPEN:
            return Visitor()
        changes_state = request.method not in READING or path in CHANGING_STATE
        self._browsers.check(request, changes_state)
        authorization = authorization_of(request)
        if path.startswith(MEMBERSHIP):
            if self._nodes.tenant(authorization) is None:
                raise Unauthorized("This is for nodes that have the cluster's secret.")
            return Visitor()
        tenant = self._clients.tenant(authorization)
        refusal = self._no_operator(request, tenant)
        if is_operators(path) and refusal is not None:
            raise refusal
        is_let_in = is_operators(path) or (path == ABORT and refusal is None)
        if self._clients and tenant is None and not is_let_in:
            raise Unauthorized("This cluster needs an API key: send Authorization: Bearer KEY.")
        return Visitor(tenant or "", is_operator=refusal is None)

    def _no_operator(self, request: Request, tenant: str | None) -> Refusal | None:
        """Why it is not an operator's."""
        if self._operators:
            if self._operators.tenant(authorization_of(request)) is not None:
                return None
            return Unauthorized(
                "This is for operators: send Authorization: Bearer KEY with a key of "
                "--admin-api-key."
            )
        if not self._is_of_this_host(request):
            return Forbidden(
                "This is for operators, and accepted from the gateway's own host only: start it "
                "with --admin-api-key to let others.",
                "operator",
            )
        if self._clients and tenant is None:
            return Unauthorized("This is for operators: send Authorization: Bearer KEY.")
        return None

    def _is_of_this_host(self, request: Request) -> bool:
        """Not through a proxy here, for a client elsewhere; nor by a name of somebody else's."""
        client = request.client.host if request.client else None
        own, _ = request.scope.get("server") or (None, None)
        is_here = is_loopback(client) or (client is not None and client == own)
        if not is_here or any(name in request.headers for name in _OF_A_PROXY):
            return False
        return self._browsers.knows(host_of(request))
