"""A request can be cancelled wherever it is, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from common.messages.from_gateway import EndPlan, EnginePlan, ReadShare, ReleasePlan
from launch.gateway.request import walk as request_walk
from tests.launch.gateway.client import CHAT, PROMPT, keys_of, post
from tests.launch.gateway.stubs import StubCluster, StubEngine
from tests.launch.gateway.stubs import running_cluster as cluster_of

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

FULL = {"free_tokens": 0, "sequences": 1}


async def _fill(cluster: StubCluster) -> None:
    """No request finds an engine any more."""
    cluster.decodes[0].load_changes = FULL
    known = cluster.services.scheduler.state.engines
    await cluster.until(lambda: known.free_tokens[known.row_of["d0"]] == 0)


async def _tokenizing(cluster: StubCluster) -> Callable[[], bool]:
    for engine in cluster.engines:
        engine.tokenizing = asyncio.Event()
    return lambda: bool(cluster.walks_named("mine"))


async def _queued(cluster: StubCluster) -> Callable[[], bool]:
    await _fill(cluster)
    first = asyncio.create_task(post(cluster, "/v1/chat/completions", {**CHAT, "rid": "first"}))
    cluster.others.append(first)
    await cluster.until(lambda: cluster.services.admission.queued == 1)
    return lambda: cluster.services.admission.queued == 2


async def _planning(cluster: StubCluster) -> Callable[[], bool]:
    await _fill(cluster)
    return lambda: cluster.services.admission.queued == 1


async def _reading(cluster: StubCluster) -> Callable[[], bool]:
    cluster.agents["node-p"].slow = True
    return lambda: bool(cluster.agents["node-p"].got(ReadShare))


async def _handed_over(cluster: StubCluster) -> Callable[[], bool]:
    cluster.decodes[0].silent = True
    return lambda: bool(cluster.prefills[0].got(EnginePlan))


async def _running(cluster: StubCluster) -> Callable[[], bool]:
    cluster.decodes[0].faults = ["hang"]
    return lambda: bool(cluster.decodes[0].bodies)


async def _streaming(cluster: StubCluster) -> Callable[[], bool]:
    cluster.decodes[0].word_delay_s = 30
    return lambda: any(walk.answer.opened for walk in cluster.services.walks.values())


PLACES = [_tokenizing, _queued, _planning, _reading, _handed_over, _running, _streaming]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("way", ["leave", "abort"])
async def test_a_request_is_cancelled_wherever_it_is(place, way, monkeypatch) -> None:
    monkeypatch.setattr(request_walk, "ABORT_GRACE_S", 0.2)
    async with cluster_of(path_policy="prefill", heartbeat_timeout_s=10) as cluster:
        await cluster.announce("node-p", keys_of(PROMPT))
        there = await place(cluster)
        body = {**CHAT, "rid": "mine", "stream": place is _streaming}
        request = asyncio.create_task(post(cluster, "/v1/chat/completions", body))
        await cluster.until(there)
        if way == "leave":
            request.cancel()
        else:
            assert (await post(cluster, "/abort_request", {"rid": "mine"}))[0] == 200
            if place is not _streaming:  # there the engines end the stream
                status, answer, _ = await request
                assert status == 200 and answer["choices"][0]["finish_reason"] == "abort"
        if place is _streaming:
            await cluster.until(
                lambda: all(e.aborted == [e.bodies[0]["rid"]] for e in cluster.engines)
            )
            request.cancel()
        await cluster.until(lambda: not cluster.walks_named("mine"))
        await _serve_again(cluster)
        await asyncio.gather(*cluster.others)
        await _nothing_is_left(cluster)


async def _serve_again(cluster: StubCluster) -> None:
    """Whatever held the request is over; the next one is served."""
    cluster.agents["node-p"].slow = False
    for engine in cluster.engines:
        engine.silent, engine.load_changes, engine.word_delay_s = False, {}, 0.0
        if engine.tokenizing is not None:
            engine.tokenizing.set()
    assert (await post(cluster, "/v1/chat/completions", {**CHAT, "rid": "next"}))[0] == 200


async def _nothing_is_left(cluster: StubCluster) -> None:
    services, agent = cluster.services, cluster.agents["node-p"]
    view = services.view
    await cluster.until(lambda: view()["requests"]["admitted"] == 0)
    await cluster.until(lambda: all(engine["idle"] for engine in view()["engines"]))
    assert view()["open_plans"] == view()["requests"]["queued"] == 0
    assert all(agent["idle"] for agent in view()["agents"])
    assert services.walks == services.plane.plans.on_delivered == {}
    assert all(not engine.watchers for engine in services.plane.members.engines.values())
    read = {share.plan for share in agent.got(ReadShare)}
    await cluster.until(lambda: read <= {end.plan for end in agent.got(ReleasePlan)})
    for engine in cluster.engines:
        placed = {plan.id for plan in engine.got(EnginePlan)}
        await _ends(cluster, engine, placed)


async def _ends(cluster: StubCluster, engine: StubEngine, placed: set[int]) -> None:
    await cluster.until(lambda: placed <= {end.plan for end in engine.got(EndPlan)})


async def test_an_id_is_taken_from_the_moment_of_admission() -> None:
    async with cluster_of() as cluster:
        await _tokenizing(cluster)
        body = {**CHAT, "rid": "mine"}
        first = asyncio.create_task(post(cluster, "/v1/chat/completions", body))
        await cluster.until(lambda: cluster.walks_named("mine"))
        status, answer, _ = await post(cluster, "/v1/chat/completions", body)
        assert status == 400 and "Duplicate" in answer["error"]["message"]
        for engine in cluster.engines:
            engine.tokenizing.set()
        assert (await first)[0] == 200
