"""Who is obeyed when two gateways are there that both believe they are the active one."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, cast

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.cluster import leader as leader_module
from common.cluster.leader import LED_S, Leader
from common.messages.from_gateway import EnginePlan
from launch.gateway.standby import standby as standby_module
from launch.gateway.standby import watch as watch_module
from launch.gateway.standby.leadership import PLANS_AHEAD, Leadership
from scheduler.scheduler import Scheduler
from tests.common.ports import free_port
from tests.launch.gateway.client import GENERATE, post
from tests.launch.gateway.standby.gateways import NOBODY, Gateway, nodes_at, running, until
from tests.launch.gateway.stubs import StubCluster

CHAT = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


@given(
    clocks=st.lists(st.integers(0, 10_000), min_size=1, max_size=8),
    planned=st.lists(st.integers(0, PLANS_AHEAD - 1), min_size=8, max_size=8),
)
def test_no_two_gateways_give_one_number_whatever_their_clocks_say(
    clocks: list[int], planned: list[int]
) -> None:
    """Each takes over from the one before it, which it has heard before its last plans, and which
    goes on."""
    given_before, heard, leader = 0, 0, Leader()
    terms = []
    for clock_s, plans in zip(clocks, planned, strict=False):
        scheduler = Scheduler("prefill")
        leadership = Leadership(scheduler, is_active=False, wall_s=partial(float, clock_s))
        leadership.begin(heard)
        assert scheduler.next_plan == leadership.term > given_before
        assert leader.heard(leadership.term)
        assert all(not leader.heard(term) and not leader.has_given(term) for term in terms)
        assert not terms or not leader.has_given(given_before)
        assert leader.has_given(leadership.term)
        terms.append(leadership.term)
        heard, given_before = leadership.term, leadership.term + plans


def test_an_active_gateway_is_missed_after_a_while() -> None:
    now = 100.0
    leader = Leader(lambda: now)
    assert leader.present_term == 0
    assert leader.heard(7) and leader.present_term == 7
    now += LED_S
    assert leader.present_term == 0 and leader.term == 7
    assert not leader.heard(6) and leader.present_term == 0
    assert leader.heard(7) and leader.present_term == 7


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "TAKEOVER_S", 0.3)
    monkeypatch.setattr(standby_module, "ASK_S", 0.05)
    # One that has ended refuses at once; one that is late with its answer is busy.
    monkeypatch.setattr(standby_module, "ANSWER_TIMEOUT_S", 30.0)


async def answered(gateway: Gateway) -> Any:
    status, answer, trace = await post(cast(StubCluster, gateway), "/generate", GENERATE)
    assert status == 200, answer
    return trace


@pytest.mark.asyncio
@pytest.mark.timeout(60)
async def test_a_gateway_that_was_cut_off_ends_when_it_is_refused(quick: None) -> None:
    first = Gateway(free_port(), [])
    second = Gateway(free_port(), [first.url])
    async with running(first, second), nodes_at(first) as nodes:
        await until(lambda: second.knows(*nodes))
        old = await answered(first)
        engines = [node.engine for node in nodes if node.engine is not None]
        for engine in engines:
            engine.word_delay_s = 30.0
        stream = await first.http.post("/v1/chat/completions", json=CHAT)
        assert b"role" in await stream.content.readany()
        # Refused by a peer that has not obeyed it yet, it would take a later term.
        peers = first.services.plane.members.peers
        await until(lambda: all(peer.obeys_us for peer in peers()))

        second.app.state.standby._take_over()  # whatever it has heard
        await asyncio.wait_for(first.superseded.wait(), 30)
        rest = (await stream.content.read()).decode()
        assert "another gateway has taken over" in rest
        status, answer, _ = await post(cast(StubCluster, first), "/generate", GENERATE)
        assert status == 503 and "superseded" in answer["error"]["message"]
        peers_of_both = [*engines, *(node.agent for node in nodes)]
        assert any(peer.refused for peer in peers_of_both)
        await until(
            lambda: all(peer.leader.term == second.leadership.term for peer in peers_of_both)
        )

        for engine in engines:
            engine.word_delay_s = 0.0
        new = await answered(second)
        assert new["plan"] >= second.leadership.term > old["plan"]
        assert all(engine.got(EnginePlan)[-1].id == new["plan"] for engine in engines)


@pytest.mark.asyncio
@pytest.mark.timeout(60)
async def test_a_later_gateway_with_a_clock_that_is_behind_is_obeyed() -> None:
    first, second = Gateway(free_port(), []), Gateway(free_port(), [])
    async with running(first), nodes_at(first) as nodes:
        await answered(first)
        term = first.leadership.term
        await first.stop()
        async with running(second):
            second.leadership.term = second.services.scheduler.next_plan = 1000
            for node in nodes:
                node.cluster = cast(StubCluster, second)
                await node.join()
            await until(lambda: second.knows(*nodes))
            await until(lambda: second.leadership.term > term)
            assert (await answered(second))["plan"] >= second.leadership.term


@pytest.mark.asyncio
@pytest.mark.timeout(60)
async def test_a_standby_that_alone_misses_the_active_gateway_stays_one(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader_module, "LED_S", 60.0)  # a busy machine is no silent gateway
    first = Gateway(free_port(), [])
    second = Gateway(free_port(), [first.url])
    async with running(first, second), nodes_at(first) as nodes:
        await until(lambda: second.knows(*nodes))
        second.app.state.standby._urls = [NOBODY]  # the way from one gateway to the other is cut
        await until(lambda: second.app.state.standby.watch.is_silent())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(second.leadership.began.wait(), 2.0)
        monkeypatch.setattr(leader_module, "LED_S", LED_S)
        await first.stop()
        await until(lambda: second.leadership.is_active)
        assert (await answered(second))["plan"] >= second.leadership.term


@pytest.mark.asyncio
@pytest.mark.timeout(60)
async def test_a_standby_that_hears_nobody_waits_for_a_node_that_comes_to_it(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else peers of a gateway that is busy say that they miss it, just before they fall silent.
    monkeypatch.setattr(leader_module, "LED_S", 60.0)
    first = Gateway(free_port(), [])
    second = Gateway(free_port(), [first.url])
    async with running(first, second), nodes_at(first) as nodes:
        await until(lambda: second.knows(*nodes))
        for node in nodes:
            node.agent.silent = True
            if node.engine is not None:
                node.engine.silent = True
        second.app.state.standby._urls = [NOBODY]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(second.leadership.began.wait(), 4.0)
        async with aiohttp.ClientSession() as http:
            await http.post(second.url + "/membership/renew", json={})
        assert not second.leadership.is_active, "it has no token"
        nodes[0].cluster = cast(StubCluster, second)
        with pytest.raises(AssertionError, match="not the active one"):
            await nodes[0].renew()
        await until(lambda: second.leadership.is_active)
