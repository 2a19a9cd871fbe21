"""What operators ask of the gateway: state, metrics, policies, drains, explanations."""

from __future__ import annotations

import asyncio

import pytest

from tests.launch.gateway.client import (
    CHAT,
    GENERATE,
    PROMPT,
    TEXT,
    content_of,
    keys_of,
    metric,
    post,
    stream_of,
)
from tests.launch.gateway.stubs import StubCluster
from tests.launch.gateway.stubs import running_cluster as cluster_of

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]


async def test_tokenizing_is_the_engines_own() -> None:
    async with cluster_of() as cluster:
        status, answer, _ = await post(cluster, "/v1/tokenize", {"prompt": ["ab", "c"]})
        assert (status, answer["tokens"]) == (200, [[97, 98], [99]])
        status, answer, _ = await post(cluster, "/v1/tokenize", {"messages": []})
        assert status == 400 and "cannot be empty" in answer["error"]["message"]
        status, answer, _ = await post(cluster, "/v1/tokenize", ["no object"])
        assert status == 400


async def test_operator_endpoints() -> None:
    async with cluster_of() as cluster:
        for path in ("/health", "/health_generate", "/v1/models", "/get_model_info"):
            async with cluster.http.get(path) as answer:
                assert answer.status == 200, path
        async with cluster.http.post("/flush_cache") as answer:
            assert answer.status == 200
        assert [engine.flushed for engine in cluster.engines] == [1, 1]
        async with cluster.http.get("/flush_cache?timeout=30") as answer:
            assert answer.status == 200
        assert {engine.flush_query for engine in cluster.engines} == {"timeout=30"}
        async with cluster.http.get("/flush_cache?timeout=-1") as answer:
            assert answer.status == 400
        assert (await post(cluster, "/admin/policy", {"path_policy": "split"}))[0] == 200
        status, answer, _ = await post(cluster, "/admin/policy", {"path_policy": "none"})
        assert status == 400 and "split" in answer["error"]["message"]
        assert (await post(cluster, "/admin/policy", {"path_policy": "os:abort"}))[0] == 400
        async with cluster.http.get("/admin/cluster") as answer:
            view = await answer.json()
        assert view["policy"] == "split" and len(view["engines"]) == 2
        assert await metric(cluster, 'dualpath:peer_up{engine="p0"}') == 1
        begun = 'dualpath:requests_total{endpoint="/generate",outcome="ok"}'
        assert await metric(cluster, begun) == 1


async def drain(cluster: StubCluster, name: str, on: bool) -> None:
    status, answer, _ = await post(cluster, "/admin/drain", {"name": name, "on": on})
    assert (status, answer) == (200, {"name": name, "draining": on})


async def test_a_drained_engine_and_agent_get_nothing_new() -> None:
    async with cluster_of(decodes=2, path_policy="n-way") as cluster:
        await cluster.announce("node-p", keys_of(PROMPT))
        cluster.decodes[0].word_delay_s = 0.3
        body = {**CHAT, "stream": True}
        running = asyncio.create_task(post(cluster, "/v1/chat/completions", body))
        await cluster.until(lambda: cluster.decodes[0].bodies)
        for name in (cluster.decodes[0].name, "node-p"):
            await drain(cluster, name, True)
        for _ in range(4):
            _, _, trace = await post(cluster, "/generate", GENERATE)
            assert trace["decode"] == cluster.decodes[1].name and trace["readers"] == {}
        status, text, _ = await running
        assert status == 200 and content_of(stream_of(text)) == TEXT
        async with cluster.http.get("/admin/cluster") as answer:
            view = await answer.json()
        draining = {e["name"] for e in (*view["engines"], *view["agents"]) if e["draining"]}
        assert draining == {cluster.decodes[0].name, "node-p"}
        for name in draining:
            await drain(cluster, name, False)
        traces = [(await post(cluster, "/generate", GENERATE))[2] for _ in range(2)]
        assert {t["decode"] for t in traces} == {"d0", "d1"}
        assert all(t["hit_blocks"] == 3 for t in traces)


async def test_a_drain_of_nobody_lists_who_there_is() -> None:
    async with cluster_of() as cluster:
        status, answer, _ = await post(cluster, "/admin/drain", {"name": "d7", "on": True})
        assert status == 404
        assert all(name in answer["error"]["message"] for name in ("p0", "d0", "node-p", "node-d"))
        assert (await post(cluster, "/admin/drain", {"name": "d0"}))[0] == 400


async def test_a_plan_is_explained_by_number_and_by_request() -> None:
    async with cluster_of(path_policy="n-way") as cluster:
        await cluster.announce("node-p", keys_of(PROMPT))
        _, _, trace = await post(cluster, "/generate", {**GENERATE, "rid": "mine"})
        views = []
        for name in ("mine", trace["plan"]):
            async with cluster.http.get(f"/admin/plan/{name}") as answer:
                assert answer.status == 200
                views.append(await answer.json())
        assert [view.pop("age_s") >= 0 for view in views] == [True, True]
        assert views[0] == views[1]
        assert (views[0]["rid"], views[0]["plan"]) == ("mine", trace["plan"])
        assert views[0]["policy"] == "n-way" and views[0]["prefill"]["chosen"] == "p0"
        assert {agent["name"] for agent in views[0]["agents"]} == {"node-p", "node-d"}
        async with cluster.http.get("/admin/plan/other") as answer:
            assert answer.status == 404
