"""SGLang's routes at the gateway that are no generating ones."""

from __future__ import annotations

import pytest
from fastapi.routing import APIRoute

from launch.gateway.doors.doors import is_operators
from launch.gateway.routes.table import OPERATORS, ROUTES
from tests.launch.gateway.client import post
from tests.launch.gateway.stubs import running_cluster as cluster_of

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]


async def test_each_route_of_the_table_is_there() -> None:
    async with cluster_of() as cluster:
        served = {route.path for route in cluster.app.routes if isinstance(route, APIRoute)}
    assert ROUTES.keys() - served == set()
    assert all(is_operators(path) for path in OPERATORS)


async def test_what_nobody_answers_is_refused_with_a_sentence() -> None:
    async with cluster_of() as cluster:
        for path, told in (
            ("/v1/embeddings", "beside this"),
            ("/v1/responses/resp_1/cancel", "stores no responses"),
            ("/api/chat", "/v1/chat/completions"),
        ):
            status, answer, _ = await post(cluster, path, {})
            assert (status, answer["error"]["code"]) == (501, 501)
            assert told in answer["error"]["message"]
        assert not any(engine.bodies for engine in cluster.engines)


async def test_a_call_for_all_engines_reaches_each_or_says_who_failed() -> None:
    async with cluster_of(decodes=2) as cluster:
        status, answer, _ = await post(cluster, "/freeze_gc", {})
        assert (status, answer) == (200, {"success": True})
        cluster.decodes[1].faults = ["500"]
        status, answer, _ = await post(cluster, "/freeze_gc", {})
        assert status == 502
        assert [e.frozen for e in cluster.engines] == [2, 2, 1]
        for engine in cluster.engines:
            assert (f"{engine.name}: 500" in answer["error"]["message"]) == (
                engine is cluster.decodes[1]
            )


async def test_a_trainer_sees_when_nothing_runs_any_more() -> None:
    async with cluster_of() as cluster, cluster.http.get("/v1/loads?include=core") as answer:
        [load] = (await answer.json())["loads"]
        assert (load["num_running_reqs"], load["num_waiting_reqs"]) == (0, 0)
