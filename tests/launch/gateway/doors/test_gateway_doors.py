"""The doors at a whole gateway, with the stubs behind it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi.routing import APIRoute
from yarl import URL

from launch.gateway.doors.doors import ABORT, MEMBERSHIP, OPEN, is_operators
from launch.gateway.doors.keys import ApiKey
from launch.gateway.doors.settings import DoorKeys, DoorSettings
from launch.gateway.routes.table import ROUTES, Answers
from tests.launch.gateway.client import GENERATE, metric
from tests.launch.gateway.stubs import StubCluster
from tests.launch.gateway.stubs import running_cluster as cluster_of

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

KEYS = DoorKeys(
    api_keys=(ApiKey("alice", "key-a"), ApiKey("bob", "key-b")),
    admin_api_keys=(ApiKey("root", "key-r"),),
)
CLIENTS = {"/abort_request", "/v1/loads"} | {
    path
    for path, (answers, _) in ROUTES.items()
    if answers in (Answers.PAIR, Answers.ANY, Answers.NOBODY)
}


async def ask(
    cluster: StubCluster, path: str, key: str, body: Any, **headers: str
) -> tuple[int, Any]:
    headers |= {"authorization": f"Bearer {key}"} if key else {}
    async with cluster.http.post(path, json=body, headers=headers) as answer:
        is_json = answer.content_type == "application/json"
        return answer.status, await (answer.json() if is_json else answer.text())


async def test_each_route_is_for_somebody() -> None:
    async with cluster_of(keys=KEYS) as cluster:
        routes = [route for route in cluster.app.routes if isinstance(route, APIRoute)]
        known = {route.path for route in routes}
        nodes = {path for path in known if path.startswith(MEMBERSHIP)}
        assert {path for path in known if not is_operators(path)} - {*OPEN} - nodes == CLIENTS
        for route in routes:
            path, method = route.path.split("{")[0], sorted(route.methods)[0]
            others: tuple[str, ...] = {ABORT: ("",)}.get(path, ("", "key-r"))  # which is for both
            others += ("key-a",) if path in nodes else ()
            for key in ("", "key-a") if is_operators(path) else others:
                headers = {"authorization": f"Bearer {key}"}
                async with cluster.http.request(method, path, headers=headers) as answer:
                    assert (answer.status == 401) == (path not in OPEN), (path, key)
        assert await metric(cluster, 'dualpath:refused_total{reason="key"}') > 0


async def test_keys_open_what_they_are_for() -> None:
    async with cluster_of(keys=KEYS) as cluster:
        assert (await ask(cluster, "/generate", "key-a", GENERATE))[0] == 200
        assert (await ask(cluster, "/flush_cache", "key-r", {}))[0] == 200
        status, answer = await ask(cluster, "/abort_request", "key-a", {"abort_all": True})
        assert status == 403 and "operators" in answer["error"]["message"]
        assert await metric(cluster, 'dualpath:refused_total{reason="operator"}') == 1
        assert (await ask(cluster, "/abort_request", "key-a", {"rid": "none"}))[0] == 200


@pytest.mark.parametrize("chosen", [{"rid": "mine"}, {"abort_all": True}])
async def test_operators_abort_whatever_request(chosen: dict[str, Any]) -> None:
    async with cluster_of(keys=KEYS) as cluster:
        cluster.decodes[0].word_delay_s = 30
        body = {**GENERATE, "rid": "mine", "stream": True}
        sent = asyncio.create_task(ask(cluster, "/generate", "key-a", body))
        walks = cluster.services.walks
        await cluster.until(lambda: any(walk.answer.opened for walk in walks.values()))
        assert (await ask(cluster, ABORT, "key-b", {"rid": "mine"}))[0] == 200
        assert not any(walk.answer.aborted for walk in walks.values())
        assert (await ask(cluster, ABORT, "key-r", chosen))[0] == 200
        assert all(walk.answer.aborted for walk in walks.values())
        sent.cancel()


async def test_operators_reach_the_engines_through_the_gateway() -> None:
    keys = DoorKeys(KEYS.api_keys, KEYS.admin_api_keys, engine_key="key-e")
    async with cluster_of(keys=keys) as cluster:
        engine = cluster.prefills[0]
        route = "/admin/engine/p0/v1/tokenize"
        status, answer = await ask(cluster, route, "key-r", {"prompt": ["a"]})
        assert (status, answer["tokens"]) == (200, [[97]])
        assert engine.authorization == "Bearer key-e", "the engine's key, never a client's"
        assert (await ask(cluster, "/admin/engine/p7/v1/tokenize", "key-r", {}))[0] == 404
        assert (await ask(cluster, "/admin/engine/p0/nowhere", "key-r", {}))[0] == 404
        headers = {"authorization": "Bearer key-r"}
        bare = "/admin/engine/p0/flush_cache?timeout=5&a=%2e+b"
        async with cluster.http.post(URL(bare, encoded=True), headers=headers) as sent:
            assert sent.status == 200
        assert engine.flush_query == "timeout=5&a=%2e+b"
        assert (await ask(cluster, route, "key-a", {}))[0] == 401


async def test_a_page_may_call_if_its_origin_is_let_in() -> None:
    settings = DoorSettings(allowed_origins=("https://Chat.example/",))
    async with cluster_of(keys=KEYS, doors=settings) as cluster:
        asks = {"access-control-request-method": "POST", "origin": "https://chat.example"}
        async with cluster.http.options("/generate", headers=asks) as answer:
            assert answer.status == 200
            assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        asks["origin"] = "https://evil.example"
        async with cluster.http.options("/generate", headers=asks) as answer:
            assert "access-control-allow-origin" not in answer.headers
        page = {"origin": "https://chat.example"}
        assert (await ask(cluster, "/generate", "key-a", GENERATE, **page))[0] == 200
        page = {"origin": "https://evil.example"}
        assert (await ask(cluster, "/generate", "key-a", GENERATE, **page))[0] == 403
