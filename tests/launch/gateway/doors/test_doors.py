"""Which requests come in, and as whom; each rule on the real middleware."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from launch.gateway.doors.doors import OPEN, Doors, is_operators
from launch.gateway.doors.keys import ApiKey
from launch.gateway.doors.settings import DoorKeys, DoorSettings
from launch.gateway.doors.visitor import visitor_of

HERE, ELSEWHERE = "127.0.0.1", "192.0.2.7"
PATHS = ("/generate", "/flush_cache", "/admin/policy", "/health", "/metrics")
CLIENTS = DoorKeys(api_keys=(ApiKey("alice", "key-a"), ApiKey("bob", "key-b")))
BOTH = DoorKeys(CLIENTS.api_keys, (ApiKey("root", "key-r"),))
ADMIN = DoorKeys(admin_api_keys=BOTH.admin_api_keys)


async def _show(request: Request) -> JSONResponse:
    visitor = visitor_of(request)
    return JSONResponse([visitor.tenant, visitor.is_operator])


class Gate:
    """The doors before an application that says whom it sees."""

    def __init__(
        self, keys: DoorKeys | None = None, bound: str = "0.0.0.0", **settings: Any
    ) -> None:
        methods = ["GET", "POST", "PUT", "HEAD"]
        app = Starlette(routes=[Route(path, _show, methods=methods) for path in PATHS])
        self.refused: list[str] = []
        self._doors = Doors(
            app, bound, DoorSettings(**settings), keys or DoorKeys(), self.refused.append
        )

    def ask(
        self,
        path: str,
        key: str = "",
        client: str = HERE,
        method: str = "POST",
        server: str = HERE,
        **headers: str,
    ) -> Any:
        """Status of a refusal, else the visitor. ``_`` in a header's name is ``-``."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        sent |= {"authorization": f"Bearer {key}"} if key else {}
        sent.setdefault("host", "127.0.0.1:30000")
        http = TestClient(self._doors, f"http://{server}:30000", client=(client, 40000))
        answer = http.request(method, path, headers=sent, json={} if method != "GET" else None)
        if answer.status_code != 200:
            assert answer.json()["error"]["code"] == answer.status_code
            return answer.status_code
        return answer.json()


@pytest.mark.parametrize("client", [HERE, "::1", "::ffff:127.0.0.1"])
def test_without_keys_operators_are_those_of_this_host(client):
    gate = Gate()
    for path in ("/generate", "/admin/policy", "/flush_cache"):
        assert gate.ask(path, client=client) == ["", True]


def test_a_gateway_at_an_address_of_its_own_knows_its_host_by_it():
    gate = Gate(bound="192.0.2.1")
    for client, expected in (("192.0.2.1", ["", True]), (ELSEWHERE, 403)):
        assert gate.ask("/admin/policy", client=client, server="192.0.2.1") == expected
    proxied = {"client": "192.0.2.1", "server": "192.0.2.1", "x_forwarded_for": ELSEWHERE}
    assert gate.ask("/admin/policy", **proxied) == 403


def test_without_keys_others_may_only_generate():
    gate = Gate()
    assert gate.ask("/generate", client=ELSEWHERE) == ["", False]
    for path in ("/admin/policy", "/flush_cache"):
        assert gate.ask(path, client=ELSEWHERE) == 403
        assert gate.ask(path, client=ELSEWHERE, method="GET") == 403
    assert gate.refused == ["operator"] * 4


@pytest.mark.parametrize("header", ["x_forwarded_for", "x_real_ip", "via", "forwarded"])
def test_a_proxy_on_this_host_makes_nobody_an_operator(header):
    assert Gate().ask("/admin/policy", **{header: ELSEWHERE}) == 403


def test_a_key_is_a_tenant():
    gate = Gate(CLIENTS)
    assert gate.ask("/generate", "key-a", ELSEWHERE) == ["alice", False]
    assert gate.ask("/generate", "key-b", HERE) == ["bob", True]
    for wrong in ("", "key-c", "key", "key-aa", "KEY-A"):
        assert gate.ask("/generate", wrong) == 401
    assert gate.ask("/nowhere", "") == 401  # nor is it told which routes there are
    assert gate.ask("/generate", authorization="Basic key-a") == 401
    assert gate.ask("/generate", authorization="bearer key-a") == ["alice", True]
    assert gate.ask("/admin/policy", "key-a", ELSEWHERE) == 403
    assert gate.ask("/admin/policy", "", HERE) == 401


def test_operators_have_keys_of_their_own():
    gate = Gate(BOTH)
    for client in (HERE, ELSEWHERE):
        assert gate.ask("/admin/policy", "key-r", client) == ["", True]
        assert gate.ask("/flush_cache", "key-a", client) == 401
        assert gate.ask("/generate", "key-r", client) == 401
        assert gate.ask("/generate", "key-a", client) == ["alice", False]
    alone = Gate(ADMIN)
    assert alone.ask("/generate") == ["", False]
    assert alone.ask("/admin/policy") == 401


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_probes_need_no_key(path):
    assert Gate(BOTH, bound=HERE).ask(path, client=ELSEWHERE, host="pod", method="GET") != 401
    assert all(not is_operators(path) for path in OPEN)


def test_a_page_in_a_browser_is_refused():
    gate = Gate(bound=HERE)
    own = "127.0.0.1:30000"
    for path in ("/generate", "/admin/policy", "/flush_cache"):
        for method in ("GET", "POST"):
            for origin in ("https://evil.example", "null", "http://127.0.0.1:8080"):
                assert gate.ask(path, method=method, origin=origin) == 403
            for site in ("cross-site", "same-site"):  # an image has no Origin
                assert gate.ask(path, method=method, sec_fetch_site=site) == 403
        assert gate.ask(path, origin=f"http://{own}", host=own) == ["", True]
        assert gate.ask(path, sec_fetch_site="none") == ["", True]
    assert set(gate.refused) == {"origin"}


def test_a_form_is_no_json():
    gate = Gate()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; a=b", ""):
        assert gate.ask("/admin/policy", content_type=kind) == 415
    assert gate.ask("/generate", content_type="application/json; charset=utf-8") == ["", True]
    assert gate.refused == ["content_type"] * 4


def test_a_name_made_to_point_here_is_refused():
    gate = Gate(bound=HERE)
    for host in ("evil.example", "evil.example:30000", "x/admin", "127.0.0.1.evil.example", "[x"):
        assert gate.ask("/generate", host=host) == 403
    for host in ("localhost:30000", "LOCALHOST", "127.0.0.1", "[::1]:30000", "192.0.2.1"):
        assert gate.ask("/generate", host=host) == ["", True]
    everywhere = Gate(bound="0.0.0.0")
    assert everywhere.ask("/generate", host="evil.example") == ["", False]
    assert everywhere.ask("/admin/policy", host="evil.example") == 403
    named = Gate(bound="0.0.0.0", allowed_hosts=("KV.example",))
    assert named.ask("/admin/policy", host="kv.example:30000") == ["", True]
    assert named.ask("/generate", host="evil.example") == 403


def test_what_host_says_does_not_hide_the_path():
    gate = Gate(BOTH)
    assert gate.ask("/admin/policy", "key-a", host="127.0.0.1?") == 401
    assert gate.ask("/admin/policy", "key-a", host="127.0.0.1/health?") == 401


def test_an_origin_can_be_let_in():
    gate = Gate(CLIENTS, allowed_origins=("https://chat.example",))
    page = {"origin": "https://chat.example", "sec_fetch_site": "cross-site"}
    assert gate.ask("/generate", "key-a", **page) == ["alice", True]
    assert gate.ask("/generate", "", **page) == 401
    assert gate.ask("/generate", "key-a", origin="https://chat.example.evil") == 403


def test_no_key_is_logged(caplog):
    with caplog.at_level(logging.DEBUG):
        assert Gate(BOTH).ask("/generate", "almost-a-key") == 401
    assert "reason=key" in caplog.text and "almost" not in caplog.text
