"""Who is taken in, who is refused and why, and the numbers that processes start with."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.cluster.clock import ClusterClock
from common.cluster.membership import (
    EXPIRY_S,
    JOIN,
    AgentAddress,
    HostOfGroup,
    Joined,
    JoinRequest,
    NodeMembers,
    Role,
)
from tests.launch.gateway.registry.nodes import StubNode, ask, told
from tests.launch.gateway.stubs import StubCluster, running_cluster

HOUR_S = 3600.0


async def joined(cluster: StubCluster, role: Role = Role.READER, **fields: Any) -> Joined:
    fields = {"session": f"session-{fields.get('name')}", **fields}
    return await told(cluster, JOIN, JoinRequest(role, **fields), Joined)


async def refusal(cluster: StubCluster, role: Role = Role.READER, **fields: Any) -> str:
    """Why it is not taken in."""
    status, answer = await ask(cluster, JOIN, JoinRequest(role, **fields))
    assert status == 409 and answer["error"]["type"] == "conflict_error"
    return str(answer["error"]["message"])


@pytest.mark.asyncio
async def test_the_gateway_names_those_that_have_no_name() -> None:
    async with running_cluster() as cluster:
        names = []
        for number, role in enumerate([Role.PREFILL, Role.PREFILL, Role.DECODE, Role.READER]):
            asked = JoinRequest(role, f"session-{number}")
            names.append((await told(cluster, JOIN, asked, Joined)).name)
        assert names == ["p1", "p2", "d1", "r0"]  # p0 and d0 are the configuration's
        again = await told(cluster, JOIN, JoinRequest(Role.PREFILL, "session-1"), Joined)
        assert again.name == "p2"  # its answer was lost


@pytest.mark.asyncio
async def test_unlike_settings_are_refused_with_what_differs() -> None:
    async with running_cluster() as cluster:
        why = await refusal(cluster, session="session-x", settings={"protocol": "DP1"})
        assert "protocol DP1" in why and "the gateway has DP" in why
        like = {"model": "tiny", "ranks of decode engines": "1"}
        await joined(cluster, Role.DECODE, name="d1", settings=like)
        why = await refusal(
            cluster,
            session="session-x",
            name="d2",
            settings={"model": "other", "--transfer": "tcp"},
        )
        assert "d2 has model other" in why and "d1 has tiny" in why
        why = await refusal(cluster, session="session-x", settings={"ranks of decode engines": "2"})
        assert "ranks of decode engines 2" in why and "d1 has 1" in why
        await joined(cluster, name="r0", settings={"model": "tiny", "of readers alone": "x"})
        cluster.services.registry.nodes["d1"].is_gone = True
        await joined(cluster, Role.DECODE, name="d3", settings={"ranks of decode engines": "2"})
        metrics = await (await cluster.http.get("/metrics")).text()
        for row in (
            'node_refusals_total{reason="settings"} 3.0',
            'node_changes_total{change="joined",role="decode"} 2.0',
            'nodes{role="decode",state="serving"} 1.0',
            'nodes{role="decode",state="gone"} 1.0',
        ):
            assert f"dualpath:{row}" in metrics


@pytest.mark.asyncio
async def test_a_name_is_one_nodes_until_its_lease_has_gone() -> None:
    async with running_cluster() as cluster:
        first = await joined(cluster, name="r0", session="session-1")
        status, answer = await ask(cluster, JOIN, JoinRequest(Role.READER, "session-2", "r0"))
        assert status == 409 and "it lives" in answer["error"]["message"]
        cluster.services.registry.nodes["r0"].is_gone = True
        second = await joined(cluster, name="r0", session="session-2")
        assert second.incarnation > first.incarnation and second.turn == first.turn + 1
        for name in ("p0", "d0"):
            assert name in await refusal(cluster, Role.PREFILL, session="session-3", name=name)
        taken = NodeMembers(AgentAddress("node-p", "tcp://127.0.0.1:1"))
        why = await refusal(cluster, session="session-3", name="r9", members=taken)
        assert "node-p" in why and "r9" not in cluster.services.registry.nodes


@pytest.mark.asyncio
async def test_a_node_joins_another_gateway_with_what_it_had() -> None:
    async with running_cluster() as cluster:
        scheduler = cluster.services.scheduler
        ahead = scheduler.next_plan + (1 << 30)
        asked = JoinRequest(Role.DECODE, "session-1", "d5", incarnation=1 << 45, turn=6, plan=ahead)
        again = await told(cluster, JOIN, asked, Joined)
        assert (again.name, again.incarnation, again.turn) == ("d5", 1 << 45, 6)
        assert scheduler.next_plan > ahead
        other = await joined(cluster, name="r0")
        assert other.incarnation > 1 << 45  # whatever this gateway's clock says


@pytest.mark.asyncio
async def test_hosts_of_one_engine_start_and_restart_as_one_incarnation() -> None:
    async with running_cluster() as cluster:
        nodes = [
            StubNode(cluster, Role.READER, f"r{rank}", group=HostOfGroup("p5", rank, 2))
            for rank in range(2)
        ]
        first, second = [(await node.join()).incarnation for node in nodes]
        assert first == second and nodes[0].joined.turn == nodes[1].joined.turn
        # the first host's process dies; the other one is told
        restarted = await nodes[0].restart(first)
        assert restarted.incarnation > first
        assert (await nodes[1].renew(incarnation=first)).incarnation == restarted.incarnation
        assert await nodes[1].restart(first) == restarted
        assert (await nodes[0].renew(incarnation=restarted.incarnation)).incarnation == (
            restarted.incarnation
        )
        # both die together
        both = [(await node.restart(restarted.incarnation)).incarnation for node in nodes]
        assert both[0] == both[1] > restarted.incarnation
        # a host comes anew: the engine starts anew
        asked = msgspec.structs.replace(nodes[1].asked, session="another-session")
        cluster.services.registry.nodes["r1"].is_gone = True
        anew = await told(cluster, JOIN, asked, Joined)
        assert anew.incarnation > both[0]
        assert (await nodes[0].renew(incarnation=both[0])).incarnation == anew.incarnation
        # a host is lost: the other one waits for it no longer
        registry = cluster.services.registry
        now, registry._now = registry._now, lambda: now() + EXPIRY_S + 1
        registry.sweep()
        assert (await nodes[0].renew(incarnation=anew.incarnation)).incarnation > anew.incarnation
        for node in nodes:
            await node.close()


@given(
    st.lists(
        st.tuples(st.sampled_from(["next", "note", "other gateway"]), st.integers(0, 1 << 40)),
        max_size=30,
    )
)
def test_numbers_only_grow_whatever_clocks_say(steps: list[tuple[str, int]]) -> None:
    wall_s, monotonic_s, greatest = 1000 * HOUR_S, 0.0, 0

    def clock() -> ClusterClock:
        return ClusterClock(lambda: wall_s, lambda: monotonic_s)

    given_out = clock()
    for step, number in steps:
        monotonic_s += number % 1000 / 1000
        if step == "next":
            new = given_out.next()
            assert new > greatest
            greatest = new
        elif step == "note":
            given_out.note(number)
            greatest = max(greatest, number)
        else:  # on a host whose clock is an hour behind; nodes tell it what they have
            wall_s -= HOUR_S
            given_out = clock()
            given_out.note(greatest)
