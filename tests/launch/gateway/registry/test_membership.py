"""Nodes that join, drain, leave and die while the gateway serves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from common.cluster.membership import (
    EXPIRY_S,
    JOIN,
    RENEW,
    HostOfGroup,
    Renewal,
    Role,
    State,
)
from common.samples import sample
from launch.gateway.registry import registry as registry_module
from tests.launch.gateway.client import GENERATE, PROMPT, keys_of, metric, post
from tests.launch.gateway.registry.nodes import StubNode, ask
from tests.launch.gateway.stubs import StubCluster, running_cluster

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]


@contextlib.asynccontextmanager
async def cluster_and(*nodes: tuple[Role, str], **config: Any) -> AsyncIterator[Any]:
    """A cluster of one P and one D, and nodes that have not joined yet."""
    async with running_cluster(**config) as cluster:
        made = [StubNode(cluster, role, name) for role, name in nodes]
        try:
            yield cluster, *made
        finally:
            for node in made:
                await node.close()


async def traces(cluster: StubCluster, requests: int = 4) -> list[dict[str, Any]]:
    found = []
    for _ in range(requests):
        status, _, trace = await post(cluster, "/generate", GENERATE)
        assert status == 200
        found.append(trace)
    return found


async def test_a_node_serves_once_it_has_joined_and_no_more_once_it_has_left() -> None:
    async with cluster_and((Role.DECODE, "d7")) as (cluster, node):
        joined = await node.join()
        assert joined.name == "d7" and set(joined.engines) == {"p0", "d0", "d7"}
        assert joined.agents["node-p"] == cluster.agents["node-p"].endpoint
        await node.lives()
        assert {trace["decode"] for trace in await traces(cluster)} == {"d0", "d7"}
        assert await metric(cluster, 'dualpath:peer_up{engine="d7"}') == 1
        assert (await node.renew(State.DRAINING)).idle
        assert {trace["decode"] for trace in await traces(cluster)} == {"d0"}
        await node.leave()
        async with cluster.http.get("/metrics") as answer:
            assert "d7" not in await answer.text()
        async with cluster.http.get("/admin/cluster") as answer:
            view = await answer.json()
        assert {e["name"] for e in view["engines"]} == {"p0", "d0"}
        assert {a["name"] for a in view["agents"]} == {"node-p", "node-d"}
        assert {trace["decode"] for trace in await traces(cluster)} == {"d0"}
        services = cluster.services
        peers = {"p0", "d0", "node-p", "node-d"}
        assert services.plane.serving.keys() == set(services.orders.names) == peers
        assert services.probe._tasks.keys() == {"p0", "d0"} and not services.registry.nodes


async def test_everyone_is_told_of_newcomers_and_of_who_has_left() -> None:
    async with cluster_and((Role.READER, "r0"), (Role.PREFILL, "p7")) as (cluster, reader, node):
        engine, agent = cluster.engines[0], cluster.agents["node-p"]
        await reader.join()
        await node.join()
        await cluster.until(lambda: set(agent.known[-1].names) == {"p0", "d0", "p7"})
        everyone = {"node-p", "node-d", "agent-r0", "agent-p7"}
        for stub in (engine, node.engine):
            await cluster.until(lambda s=stub: s.known and set(s.known[-1].endpoints) == everyone)
        assert engine.known[-1].hosts == agent.known[-1].hosts == ["127.0.0.1"]
        assert not engine.known[-1].complete  # others may have been there before this gateway
        await reader.leave()
        await cluster.until(lambda: set(engine.known[-1].endpoints) == everyone - {"agent-r0"})
        numbers = [one.number for one in engine.known]
        assert numbers == sorted(numbers)


async def test_a_list_is_complete_when_nodes_have_had_the_time_to_renew() -> None:
    async with running_cluster() as cluster:
        known = cluster.services.plane.known
        known._complete_at_s = 0.0
        await cluster.until(lambda: cluster.engines[0].known[-1].complete)
        await cluster.until(lambda: cluster.agents["node-d"].known[-1].complete)


async def test_an_agent_reads_for_an_engine_only_once_it_is_linked() -> None:
    async with cluster_and((Role.READER, "r0"), path_policy="n-way") as (cluster, reader):
        for engine in cluster.engines:
            engine.load_changes = {"linked": ["node-p", "node-d"]}
        links = cluster.services.scheduler.state.engines.linked
        await cluster.until(lambda: links.keys() == {"p0", "d0"})
        await reader.join()
        await reader.lives()
        cluster.agents["agent-r0"] = reader.agent
        await cluster.announce("agent-r0", keys_of(PROMPT))
        assert all(trace["readers"] == {} for trace in await traces(cluster))
        for engine in cluster.engines:
            engine.load_changes = {"linked": ["node-p", "node-d", "agent-r0"]}
        await cluster.until(lambda: all("agent-r0" in linked for linked in links.values()))
        assert all(trace["readers"].keys() == {"agent-r0"} for trace in await traces(cluster))


async def test_a_silent_node_is_drained_taken_back_and_forgotten() -> None:
    async with cluster_and((Role.DECODE, "d7")) as (cluster, node):
        registry, ahead_s = cluster.services.registry, 0.0
        real = registry._now
        registry._now = lambda: real() + ahead_s
        await node.join()
        await node.lives()
        ahead_s = EXPIRY_S + 1
        await cluster.until(lambda: registry.nodes["d7"].is_gone)
        assert {trace["decode"] for trace in await traces(cluster)} == {"d0"}
        await node.renew()
        assert {trace["decode"] for trace in await traces(cluster)} == {"d0", "d7"}
        ahead_s += registry_module.FORGET_S + 1
        await cluster.until(lambda: not registry.nodes)
        assert "d7" not in cluster.services.plane.members.engines
        status, answer = await ask(
            cluster, RENEW, Renewal(node.joined.lease, node.members, State.SERVING, 0)
        )
        assert status == 404 and "join again" in answer["error"]["message"]


async def test_requests_wait_for_a_node_whose_lease_has_run_out() -> None:
    async with cluster_and((Role.DECODE, "d7")) as (cluster, node):
        registry, ahead_s = cluster.services.registry, 0.0
        real = registry._now
        registry._now = lambda: real() + ahead_s
        await node.join()
        await node.lives()
        cluster.services.orders.drain("d0", True)
        ahead_s = EXPIRY_S + 1
        await cluster.until(lambda: registry.nodes["d7"].is_gone)
        asked = asyncio.create_task(traces(cluster, 1))
        await cluster.until(lambda: cluster.services.outage.waiting == 1)
        await node.renew()
        assert [trace["decode"] for trace in await asked] == ["d7"]
        await node.renew(State.DRAINING)
        assert not cluster.services.plane.expected()


async def test_an_operators_drain_outlasts_a_nodes_own() -> None:
    async with cluster_and((Role.DECODE, "d7")) as (cluster, node):
        await node.join()
        await node.lives()
        await node.renew(State.DRAINING)
        await post(cluster, "/admin/drain", {"name": "d7", "on": False})
        assert "d7" in cluster.services.scheduler.drained  # it is its node that wants no more
        await post(cluster, "/admin/drain", {"name": "d7", "on": True})
        await node.renew(State.SERVING)
        assert "d7" in cluster.services.scheduler.drained
        await post(cluster, "/admin/drain", {"name": "d7", "on": False})
        assert "d7" not in cluster.services.scheduler.drained


async def test_a_draining_node_is_idle_when_its_requests_and_its_agents_work_are_done() -> None:
    async with cluster_and((Role.DECODE, "d7")) as (cluster, node):
        await node.join()
        await node.lives()
        node.engine.word_delay_s = 0.2
        await post(cluster, "/admin/drain", {"name": "d0", "on": True})
        running = asyncio.create_task(post(cluster, "/generate", {**GENERATE, "stream": True}))
        await cluster.until(lambda: node.engine.bodies)
        renewed = await node.renew(State.DRAINING)
        assert (renewed.idle, renewed.open_plans) == (False, 1)
        assert (await running)[0] == 200
        assert (await node.renew(State.DRAINING)).idle
        node.agent.samples = [sample("agent_tier_write_queue_bytes", 7, tier="ssd")]
        peer = cluster.services.plane.members.agents["agent-d7"]
        await cluster.until(lambda: peer.status.samples == node.agent.samples)
        assert not (await node.renew(State.DRAINING)).idle


async def test_an_engine_over_two_hosts_serves_while_both_do() -> None:
    async with cluster_and((Role.DECODE, "d7"), (Role.READER, "d7-1")) as (cluster, first, second):
        for rank, node in enumerate((first, second)):
            node.asked = msgspec.structs.replace(node.asked, group=HostOfGroup("d7", rank, 2))
        begun = await first.join()
        await first.lives()
        assert {trace["decode"] for trace in await traces(cluster)} == {"d0"}
        async with cluster.http.get("/workers/d7") as answer:
            assert (await answer.json())["metadata"]["state"] == "gone"
        await second.join()
        await second.lives()
        assert {trace["decode"] for trace in await traces(cluster)} == {"d0", "d7"}

        # One that drains has to wait for the requests that its engine has.
        first.engine.word_delay_s = 0.2
        await post(cluster, "/admin/drain", {"name": "d0", "on": True})
        running = asyncio.create_task(post(cluster, "/generate", {**GENERATE, "stream": True}))
        open_plans = cluster.services.scheduler.open
        await cluster.until(lambda: open_plans.naming({"d7"}))
        assert not (await second.renew(State.DRAINING)).idle
        await post(cluster, "/admin/drain", {"name": "d0", "on": False})
        assert (await running)[0] == 200
        assert (await second.renew(State.DRAINING)).idle
        assert {trace["decode"] for trace in await traces(cluster)} == {"d0"}
        assert not {"agent-d7", "d0"} & cluster.services.scheduler.drained

        # The other host's ranks begin anew, and wait for one that comes in its place.
        await second.leave()
        anew = (await first.renew(incarnation=begun.incarnation)).incarnation
        assert anew > begun.incarnation
        assert (await first.restart(begun.incarnation)).incarnation == anew
        assert {trace["decode"] for trace in await traces(cluster)} == {"d0"}
        assert (await second.join()).incarnation == anew
        assert {trace["decode"] for trace in await traces(cluster)} == {"d0", "d7"}


async def test_a_node_that_dies_takes_no_request_with_it() -> None:
    async with cluster_and((Role.DECODE, "d7")) as (cluster, node):
        await node.join()
        await node.lives()
        node.engine.faults = ["hang"] * 4
        await post(cluster, "/admin/drain", {"name": "d0", "on": True})
        running = asyncio.create_task(post(cluster, "/generate", GENERATE))
        await cluster.until(lambda: node.engine.bodies)
        await post(cluster, "/admin/drain", {"name": "d0", "on": False})
        await node.leave()  # with a request under way
        status, _, trace = await running
        assert status == 200 and trace["decode"] == "d0"


async def test_names_and_rows_are_used_again() -> None:
    async with running_cluster() as cluster:
        state = cluster.services.scheduler.state
        for _ in range(3):
            node = StubNode(cluster, Role.DECODE, "d1")
            joined = await node.join()
            assert joined.name == "d1"
            await node.lives()
            await node.leave()
            await node.close()
        assert len(state.engines.names) == len(state.agents.names) == 3


async def test_who_has_not_the_secret_does_not_join() -> None:
    async with cluster_and((Role.DECODE, "d7")) as (cluster, node):
        for authorization in ("", "Bearer wrong"):
            status, answer = await ask(cluster, JOIN, node.asked, authorization=authorization)
            assert status == 401 and "secret" in answer["error"]["message"]
        assert "d7" not in cluster.services.plane.members.engines
        status, _ = await ask(cluster, JOIN, {"role": "decode"})
        assert status == 400
