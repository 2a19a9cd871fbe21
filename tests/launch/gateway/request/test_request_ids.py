"""Engines know a request by an id that nobody can guess; its client knows it by its own."""

from __future__ import annotations

import asyncio
import re

import pytest

from common.messages.from_gateway import EnginePlan
from tests.launch.gateway.client import CHAT, GENERATE, post, stream_of
from tests.launch.gateway.stubs import StubCluster
from tests.launch.gateway.stubs import running_cluster as cluster_of

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

ANNE, BERT = {"authorization": "Bearer anne"}, {"authorization": "Bearer bert"}


async def ask(cluster: StubCluster, rid: str, headers: dict[str, str]) -> int:
    """A request that runs until it is aborted or its words may go on."""
    body = {**GENERATE, "rid": rid, "stream": True}
    async with cluster.http.post("/generate", json=body, headers=headers) as answer:
        await answer.read()
        return answer.status


async def abort(cluster: StubCluster, rid: str, headers: dict[str, str]) -> None:
    async with cluster.http.post("/abort_request", json={"rid": rid}, headers=headers) as answer:
        assert answer.status == 200


@pytest.mark.parametrize("rid", ["mine", 'a"\\\n\u00e9'])
async def test_no_client_id_reaches_an_engine_and_every_answer_shows_it(rid: str) -> None:
    async with cluster_of() as cluster:
        _, chat, _ = await post(cluster, "/v1/chat/completions", {**CHAT, "rid": rid})
        _, generated, _ = await post(cluster, "/generate", {**GENERATE, "rid": rid})
        _, text, _ = await post(
            cluster, "/v1/completions", {"prompt": "a", "rid": rid, "stream": True}
        )
        listed = {"text": ["ab", "cd"], "rid": rid}
        _, both, _ = await post(cluster, "/generate", listed)
        assert chat["id"] == generated["meta_info"]["id"] == rid
        assert {event["id"] for event in stream_of(text) if event != "[DONE]"} == {rid}
        assert [answer["meta_info"]["id"] for answer in both] == [f"{rid}_0", f"{rid}_1"]
        for engine in cluster.engines:
            seen = [body["rid"] for body in engine.bodies]
            assert seen == [plan.rid for plan in engine.got(EnginePlan)]
            assert len(set(seen)) == 5
            assert all(re.fullmatch("[0-9a-f]{32}", name) for name in seen)
        async with cluster.http.get(f"/admin/plan/{seen[0]}") as answer:
            assert (await answer.json())["rid"] == rid


async def test_an_error_names_the_request_as_its_client_does() -> None:
    async with cluster_of() as cluster:
        cluster.prefills[0].faults = cluster.decodes[0].faults = ["named"]
        status, answer, _ = await post(cluster, "/generate", {**GENERATE, "rid": "mine"})
        assert (status, answer["error"]["message"]) == (400, "request mine is refused")


async def test_an_abort_ends_the_request_of_that_very_id_and_nobody_elses() -> None:
    async with cluster_of() as cluster:
        cluster.decodes[0].word_delay_s = 30
        asked = [("a", ANNE), ("ab", ANNE), ("a", BERT), ("a", {})]
        sent = [asyncio.create_task(ask(cluster, *one)) for one in asked]
        await cluster.until(lambda: len(cluster.decodes[0].bodies) == len(asked))
        walks = cluster.services.walks
        await cluster.until(lambda: all(walk.answer.opened for walk in walks.values()))
        await abort(cluster, "a", ANNE)
        [aborted] = [walk for walk in walks.values() if walk.answer.aborted]
        assert aborted is next(iter(walks.values()))
        for engine in cluster.engines:
            assert len(engine.aborted) == 1
        await abort(cluster, "", ANNE)
        await abort(cluster, engine.aborted[0], ANNE)
        assert sum(walk.answer.aborted for walk in walks.values()) == 1
        for task in sent:
            task.cancel()
        await cluster.until(lambda: not walks)


async def test_an_abort_by_a_requests_id_ends_all_of_its_parts() -> None:
    async with cluster_of() as cluster:
        cluster.decodes[0].word_delay_s = 30
        body = {**CHAT, "n": 2, "rid": "mine", "stream": True}
        sent = asyncio.create_task(post(cluster, "/v1/chat/completions", body))
        await cluster.until(lambda: len(cluster.decodes[0].bodies) == 2)
        walks = cluster.services.walks
        await cluster.until(lambda: all(walk.answer.opened for walk in walks.values()))
        await abort(cluster, "mine_1", {})
        assert [walk.answer.aborted for walk in walks.values()] == [False, True]
        await abort(cluster, "mine", {})
        assert [walk.answer.aborted for walk in walks.values()] == [True, True]
        sent.cancel()
        await cluster.until(lambda: not walks)


async def test_a_client_that_leaves_takes_no_other_of_the_same_id_with_it() -> None:
    async with cluster_of() as cluster:
        cluster.decodes[0].word_delay_s = 0.5
        staying = asyncio.create_task(ask(cluster, "a", ANNE))
        leaving = asyncio.create_task(ask(cluster, "a", BERT))
        await cluster.until(lambda: len(cluster.decodes[0].bodies) == 2)
        leaving.cancel()
        await cluster.until(lambda: len(cluster.services.walks) == 1)
        assert await staying == 200
        for engine in cluster.engines:
            assert len(engine.aborted) == 1
