"""Tenants at one gateway: a full queue, the order in it, and what can be seen of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from common.prefill_cost import PrefillCost
from tests.launch.gateway.client import CHAT, GENERATE, PROMPT, TEXT, keys_of, metric, post
from tests.launch.gateway.stubs import StubCluster
from tests.launch.gateway.stubs import running_cluster as cluster_of

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

Sent = asyncio.Task[tuple[int, Any, Any]]


async def fill_up(cluster: StubCluster, full: bool) -> None:
    """No request finds a decode engine any more, or each one does again."""
    changes = {"free_tokens": 0, "sequences": 1} if full else {}
    cluster.decodes[0].load_changes = changes
    known = cluster.services.scheduler.state.engines
    await cluster.until(lambda: (known.sequences[known.row_of["d0"]] == 1) == full)


async def send(cluster: StubCluster, rid: str, **fields: Any) -> Sent:
    """Send a request; returns once it is queued, or answered."""
    before = cluster.services.admission.queued
    sent = asyncio.create_task(post(cluster, "/generate", {**GENERATE, "rid": rid, **fields}))
    await cluster.until(lambda: cluster.services.admission.queued > before or sent.done())
    return sent


async def test_a_light_tenant_gets_in_when_a_heavy_one_fills_the_queue() -> None:
    async with cluster_of(requests_max=4) as cluster:
        await fill_up(cluster, True)
        heavy = [await send(cluster, f"h{i}", user="heavy") for i in range(4)]
        status, answer, _ = await post(cluster, "/generate", {**GENERATE, "user": "heavy"})
        assert status == 429 and "at most 4" in answer["error"]["message"]
        body = {**GENERATE, "rid": "light", "user": "light"}
        light = asyncio.create_task(post(cluster, "/generate", body))
        status, answer, _ = await heavy[3]
        assert status == 429 and answer["error"]["type"] == "rate_limit_error"
        assert await metric(cluster, "dualpath:requests_displaced_total") == 1
        assert await metric(cluster, "dualpath:requests_in_flight") == 4
        await fill_up(cluster, False)
        assert [(await sent)[0] for sent in (*heavy[:3], light)] == [200] * 4


async def test_tenants_take_turns_and_priority_counts_within_one() -> None:
    async with cluster_of() as cluster:
        await fill_up(cluster, True)
        sent = [await send(cluster, f"h{i}", user="heavy") for i in range(4)]
        sent.append(await send(cluster, "urgent", user="heavy", priority=7))
        sent.append(await send(cluster, "salted", user="heavy", cache_salt="s"))
        assert await metric(cluster, "dualpath:requests_queued") == 6
        assert await metric(cluster, "dualpath:tenants_queued") == 2
        async with cluster.http.get("/admin/cluster") as answer:
            assert (await answer.json())["requests"]["tenants_queued"] == 2
        await fill_up(cluster, False)
        assert [(await one)[1]["text"] for one in sent] == [TEXT] * 6
        async with cluster.http.get("/admin/cluster") as answer:
            recent = (await answer.json())["requests"]["recent"]
        plans = {ended["rid"]: ended["plan"] for ended in recent}
        order = sorted(plans, key=plans.__getitem__)
        # h0 had its turn before the others came; then the tenant that waited least.
        assert order == ["h0", "salted", "urgent", "h1", "h2", "h3"]
        assert {ended["outcome"] for ended in recent} == {"ok"}
        assert await metric(cluster, "dualpath:queue_time_seconds_count") == 6


async def test_the_key_tells_tenants_apart_that_say_nothing_else() -> None:
    async with cluster_of(requests_max=2) as cluster:
        await fill_up(cluster, True)
        held = [await send(cluster, f"h{i}") for i in range(2)]
        status, _, _ = await post(cluster, "/generate", GENERATE)
        assert status == 429
        headers = {"Authorization": "Bearer key"}
        async with asyncio.timeout(10):
            request = cluster.http.post("/v1/chat/completions", json=CHAT, headers=headers)
            other = asyncio.create_task(request.__aenter__())
            assert (await held[1])[0] == 429
        await fill_up(cluster, False)
        assert (await held[0])[0] == (await other).status == 200


async def test_the_error_of_estimates_is_a_metric() -> None:
    async with cluster_of(path_policy="prefill") as cluster:
        agent = cluster.agents["node-p"]
        await cluster.announce(agent.name, keys_of(PROMPT))
        cost = PrefillCost(base_s=0.5, token_s=0.01, pair_s=0.0)
        cluster.prefills[0].load_changes = {"prefill_cost": cost}
        known = cluster.services.scheduler.state.engines
        await cluster.until(lambda: known.token_s[known.row_of["p0"]])
        _, _, trace = await post(cluster, "/generate", GENERATE)
        assert trace["estimates_s"]["first_token"] == pytest.approx(0.5, rel=0.2)
        # The stubs' reads and forwards take next to no time.
        name = "dualpath:first_token_time_ratio"
        assert await metric(cluster, f"{name}_count") == 1
        assert await metric(cluster, f"{name}_sum") < 0.5
        assert await metric(cluster, "dualpath:read_time_ratio_count") == 0  # below 1 ms
        assert await metric(cluster, 'dualpath:read_backlog_seconds{agent="node-p"}') == 0
        assert await metric(cluster, 'dualpath:peer_draining{engine="d0"}') == 0
        await post(cluster, "/admin/drain", {"name": "d0", "on": True})
        assert await metric(cluster, 'dualpath:peer_draining{engine="d0"}') == 1
