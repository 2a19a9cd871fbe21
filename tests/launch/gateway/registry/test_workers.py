"""Engines as the workers of SGLang's router, for who has tools for that."""

from __future__ import annotations

from typing import Any

import pytest

from common.cluster.membership import Role
from launch.gateway.doors.doors import is_operators
from tests.launch.gateway.client import GENERATE, post
from tests.launch.gateway.registry.nodes import StubNode
from tests.launch.gateway.stubs import StubCluster, running_cluster

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]


async def call(cluster: StubCluster, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    async with cluster.http.request(method, path, json=body) as answer:
        return answer.status, await answer.json()


async def states(cluster: StubCluster) -> dict[str, str]:
    _, listed = await call(cluster, "GET", "/workers")
    return {worker["id"]: worker["metadata"]["state"] for worker in listed["workers"]}


async def test_workers_are_shown_as_sglangs_router_does() -> None:
    async with running_cluster(decodes=2) as cluster:
        status, listed = await call(cluster, "GET", "/workers")
        assert status == 200 and listed["total"] == 3
        assert listed["stats"] == {"prefill_count": 1, "decode_count": 2, "regular_count": 0}
        (p0,) = [one for one in listed["workers"] if one["id"] == "p0"]
        assert p0["worker_type"] == "prefill" and p0["is_healthy"] and p0["bootstrap_port"] == 8998
        assert await call(cluster, "GET", "/workers/p0") == (200, p0)
        assert (await call(cluster, "GET", "/workers/p9"))[0] == 404
        _, urls = await call(cluster, "GET", "/list_workers")
        assert p0["metadata"]["http"] in urls["urls"]
        itself = {"url": p0["url"], "worker_type": "regular"}  # as slime adds what it takes for one
        _, taken = await call(cluster, "POST", "/workers", itself)
        assert taken["worker_id"] == "gateway"


async def test_one_of_the_configuration_is_drained_and_taken_back_by_its_url() -> None:
    async with running_cluster(decodes=2) as cluster:
        _, worker = await call(cluster, "GET", "/workers/d0")
        url = worker["metadata"]["http"]
        assert (await call(cluster, "DELETE", "/workers/d0"))[0] == 202
        assert (await states(cluster))["d0"] == "draining"
        for _ in range(3):
            _, _, trace = await post(cluster, "/generate", GENERATE)
            assert trace["decode"] == "d1"
        status, answer = await call(cluster, "POST", f"/add_worker?url={url}")
        assert (status, answer["worker_id"]) == (202, "d0")
        assert (await states(cluster))["d0"] == "serving"
        assert (await call(cluster, "POST", f"/remove_worker?url={url}"))[0] == 202
        assert (await states(cluster))["d0"] == "draining"
        assert (await call(cluster, "POST", "/remove_worker?url=http://nobody"))[0] == 404


async def test_an_engine_is_taken_by_hand_and_goes_once_it_is_idle() -> None:
    async with running_cluster() as cluster:
        node = StubNode(cluster, Role.DECODE, "d7")
        assert node.engine is not None
        await node.engine.start_http()
        (address,) = node.members.engines
        asked = {
            "url": address.http,
            "worker_type": "decode",
            "labels": {
                "name": "d7",
                "control": address.control,
                "agent": node.agent.name,
                "agent-control": node.agent.endpoint,
            },
            "priority": 50,
        }
        for missing in ("url", "worker_type", "labels"):
            body = {**asked, missing: {} if missing == "labels" else ""}
            status, answer = await call(cluster, "POST", "/workers", body)
            assert status == 400 and "launch.node" in answer["error"]["message"]
        assert (await call(cluster, "POST", "/workers", asked))[0] == 202
        await node.lives()
        node.engine.load_changes = {"sequences": 1}
        peer = cluster.services.plane.members.engines["d7"]
        await cluster.until(lambda: peer.hello.load.sequences == 1)
        assert (await call(cluster, "DELETE", "/workers/d7"))[0] == 202
        assert (await states(cluster))["d7"] == "draining"
        node.engine.load_changes = {}
        await cluster.until(lambda: "d7" not in cluster.services.plane.members.engines)
        assert (await states(cluster)).keys() == {"p0", "d0"}
        await node.close()


@pytest.mark.parametrize(
    "path", ["/workers", "/workers/p0", "/add_worker", "/remove_worker", "/list_workers"]
)
async def test_they_are_operators_routes(path: str) -> None:
    assert is_operators(path) and not is_operators("/membership/join")
