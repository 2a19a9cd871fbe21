"""While a role has no engine, requests wait for one, in their turn and a bounded time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from launch.gateway.errors import Unavailable
from launch.gateway.outage import Outage
from launch.gateway.peers import control_plane, http_probe, plan_handover
from launch.gateway.request.cancel_scope import CancelScope
from tests.launch.gateway.client import CHAT, GENERATE, metric, post
from tests.launch.gateway.stubs import StubCluster
from tests.launch.gateway.stubs import running_cluster as cluster_of

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]


@pytest.fixture(autouse=True)
def _no_time_lost(monkeypatch):
    monkeypatch.setattr(control_plane, "CHECK_S", 0.05)
    monkeypatch.setattr(http_probe, "PROBE_S", 0.1)
    monkeypatch.setattr(plan_handover, "ACCEPT_TIMEOUT_S", 0.2)


Sent = asyncio.Task[tuple[int, Any, Any]]


def send(cluster: StubCluster, **fields: Any) -> Sent:
    return asyncio.create_task(post(cluster, "/generate", {**GENERATE, **fields}))


async def lose(cluster: StubCluster, *engines: Any) -> None:
    members = cluster.services.plane.members
    for engine in engines:
        engine.last_words = False
        await engine.die()
        peer = members.engines[engine.name]
        peer.last_seen_s -= 100  # as long ago as that
        await cluster.until(lambda peer=peer: not members.alive(peer))


@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
async def test_requests_wait_in_their_turn_for_an_engine_that_comes_back(role: str) -> None:
    async with cluster_of() as cluster:
        lost = {"prefill": cluster.prefills, "decode": cluster.decodes, "both": cluster.engines}
        await lose(cluster, *lost[role])
        sent = [send(cluster, text=f"{i}, please") for i in range(3)]
        waiting = cluster.services.outage
        await cluster.until(lambda: waiting.waiting == 3)
        assert await metric(cluster, "dualpath:requests_without_engine") == 3
        assert not any(task.done() for task in sent)
        for engine in lost[role]:
            await engine.restart()
        assert [(await task)[0] for task in sent] == [200] * 3
        order = [chr(body["input_ids"][0]) for body in cluster.decodes[0].bodies]
        assert sorted(order) == ["0", "1", "2"]
        assert role == "both" or order == ["0", "1", "2"]  # else some engine had to tokenise first
        assert waiting.waiting == 0


async def test_it_is_the_engines_return_that_wakes_them(monkeypatch) -> None:
    async with cluster_of() as cluster:
        await lose(cluster, cluster.decodes[0])
        sent = send(cluster)
        await cluster.until(lambda: cluster.services.outage.waiting == 1)
        monkeypatch.setattr(control_plane, "CHECK_S", 40.0)
        cluster.services.plane.changed.set()
        await asyncio.sleep(0.1)
        await cluster.decodes[0].restart()
        # The probe, or the hello, of the new process: whichever is later.
        cluster.services.plane.members.engines["d0"].try_send(control_plane.Ping())
        assert (await asyncio.wait_for(sent, 20))[0] == 200


async def test_after_the_wait_all_are_told_when_to_come_again() -> None:
    async with cluster_of(engine_wait_s=0.6) as cluster:
        await lose(cluster, cluster.decodes[0])
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        sent = [send(cluster) for _ in range(4)]
        for task in sent:
            status, answer, _ = await task
            assert status == 503 and "none came back within 0.6 s" in answer["error"]["message"]
        assert 0.6 <= loop.time() - begun_s < 4 * 0.6  # not one after another
        async with cluster.http.post("/v1/chat/completions", json=CHAT) as answer:
            assert answer.status == 503 and int(answer.headers["retry-after"]) >= 5
        assert cluster.services.admission.admitted == cluster.services.outage.waiting == 0


async def test_a_drained_engine_is_not_waited_for() -> None:
    async with cluster_of(prefills=2) as cluster:
        first, second = (engine.name for engine in cluster.prefills)
        for name in (first, second):
            assert (await post(cluster, "/admin/drain", {"name": name, "on": True}))[0] == 200
        status, answer, _ = await send(cluster)
        assert status == 503 and "none is alive and taking" in answer["error"]["message"]
        assert "came back" not in answer["error"]["message"]
        # One that is only lost is waited for, although the other is drained.
        await post(cluster, "/admin/drain", {"name": second, "on": False})
        await lose(cluster, cluster.prefills[1])
        sent = send(cluster)
        await cluster.until(lambda: cluster.services.outage.waiting == 1)
        assert (await post(cluster, "/admin/drain", {"name": first, "on": False}))[0] == 200
        assert (await sent)[0] == 200


async def test_engines_whose_end_is_not_known_yet_are_waited_for_as_well(monkeypatch) -> None:
    monkeypatch.setattr(http_probe, "PROBE_S", 60.0)
    async with cluster_of() as cluster:
        for engine in cluster.engines:
            await engine.close_http()
        assert len(cluster.services.plane.members.live_engines()) == 2
        async with cluster.http.get("/v1/models") as answer:
            assert answer.status == 503
        sent = send(cluster)
        await cluster.until(lambda: cluster.services.outage.waiting == 1)
        for engine in cluster.engines:
            await engine.start_http()
        assert (await sent)[0] == 200
        assert cluster.services.outage._since_s is None


async def test_a_client_that_leaves_waits_no_longer() -> None:
    async with cluster_of() as cluster:
        await lose(cluster, cluster.decodes[0])
        sent = [
            send(cluster),
            asyncio.create_task(post(cluster, "/v1/completions", {"prompt": "a"})),
        ]
        await cluster.until(lambda: cluster.services.outage.waiting == 2)
        for task in sent:
            task.cancel()
        await cluster.until(lambda: not cluster.services.walks)
        assert cluster.services.outage.waiting == cluster.services.admission.admitted == 0


async def test_a_request_outlives_the_restart_of_the_only_engine() -> None:
    async with cluster_of() as cluster:
        engine = cluster.prefills[0]
        engine.faults, engine.last_words = ["hang"], False
        sent = send(cluster)
        await cluster.until(lambda: engine.bodies)
        await engine.die()
        await cluster.until(lambda: cluster.services.outage.waiting == 1)
        await engine.restart()
        status, _, trace = await sent
        assert (status, trace["prefill"]) == (200, "p0") and trace["attempts"] >= 2


async def test_an_engine_that_takes_no_plan_is_waited_for_as_well() -> None:
    async with cluster_of() as cluster:
        cluster.decodes[0].silent = True
        sent = send(cluster)
        await cluster.until(lambda: cluster.services.outage.waiting == 1)
        cluster.decodes[0].silent = False
        status, _, trace = await sent
        assert (status, trace["attempts"]) == (200, 2)


async def test_retry_after_is_the_last_outages_length() -> None:
    now = [100.0]

    async def change() -> None:
        await asyncio.sleep(0)

    outage = Outage(30.0, change, lambda: now[0])
    scopes = [CancelScope(100, TimeoutError()) for _ in range(2)]

    async def block(scope: CancelScope, waits: list[float]) -> None:
        async with scope:
            with outage.bounded(scope):
                for at_s in waits:
                    now[0] = at_s
                    await outage.wait("no engine")

    await block(scopes[0], [100.0, 129.0])
    now[0] = 145.0
    outage.over()  # after 45 s
    outage.over()
    now[0] = 200.0
    with pytest.raises(Unavailable, match="no engine; none came back within 30 s") as ended:
        await block(scopes[1], [200.0, 229.0, 230.0, 231.0])
    assert ended.value.retry_after_s == 15  # of 45, 30 have passed
    assert outage.waiting == 0
