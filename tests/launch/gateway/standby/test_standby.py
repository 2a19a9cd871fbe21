"""Two gateways: one serves, the other knows what it knows, and takes over when it is silent."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from common.cluster.membership import Renewed, Role
from launch.gateway.standby import door as door_module
from launch.gateway.standby import standby as standby_module
from launch.gateway.standby import watch as watch_module
from tests.common.ports import free_port
from tests.launch.gateway.client import GENERATE, PROMPT, keys_of, post
from tests.launch.gateway.registry.nodes import StubNode
from tests.launch.gateway.standby.gateways import NOBODY, Gateway, nodes_at, running, until
from tests.launch.gateway.stubs import StubCluster

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(120)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "TAKEOVER_S", 0.3)
    for module in (standby_module, watch_module):
        monkeypatch.setattr(module, "ASK_S", 0.05, raising=False)
    monkeypatch.setattr(standby_module, "ASK_WHILE_ACTIVE_S", 0.1)
    # On a busy machine all takes longer: an answer of one that lives, and a takeover.
    monkeypatch.setattr(standby_module, "ANSWER_TIMEOUT_S", 30.0)
    monkeypatch.setattr(door_module, "HOLD_S", 60.0)


def two_alike() -> tuple[Gateway, Gateway]:
    """Started by the same command: each is named to both."""
    ports = [free_port(), free_port()]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    first, second = (Gateway(port, urls) for port in ports)
    return first, second


async def ask(gateway: Gateway, path: str, body: Any = None) -> tuple[int, Any]:
    status, value, _ = await post(cast(StubCluster, gateway), path, body or {})
    return status, value


async def generate(gateway: Gateway) -> dict[str, Any]:
    """The trace of an answer."""
    status, answer, trace = await post(cast(StubCluster, gateway), "/generate", GENERATE)
    assert status == 200, answer
    return cast(dict[str, Any], trace)


async def ends(first: Gateway, second: Gateway) -> None:
    """Until its standby has seen it: from then on that keeps requests until it is active."""
    await first.stop()
    await until(lambda: second.app.state.standby.may_take_over or second.leadership.is_active)


async def stands_by(second: Gateway, first: Gateway) -> None:
    await until(lambda: second.app.state.standby.active_url == first.url)
    assert not second.leadership.is_active


async def test_the_standby_takes_over_with_all_that_the_active_one_knew() -> None:
    first, second = two_alike()
    async with running(first):
        await until(lambda: first.leadership.is_active)
        async with running(second), nodes_at(first) as nodes:
            await stands_by(second, first)
            p0 = nodes[0]
            p0.agent.held += keys_of(PROMPT)
            status, answer = await ask(first, "/admin/drain", {"name": "agent-d0", "on": True})
            assert status == 200, answer
            before = await generate(first)
            await until(lambda: second.knows(*nodes))
            await until(lambda: "agent-d0" in second.services.scheduler.drained)
            lease = second.services.registry.nodes["p0"].lease
            assert lease == p0.joined.lease

            await ends(first, second)
            after = await generate(second)  # it waits for the second to be active
            assert after["plan"] > before["plan"]
            assert second.services.scheduler.drained == {"agent-d0"}
            assert second.leadership.takeovers_total == 1
            p0.cluster = cast(StubCluster, second)
            assert isinstance(await p0.renew(), Renewed)  # its lease is known

            third = Gateway(first.config.port, first.config.standby_of)
            async with running(third):  # the first one, started again
                await stands_by(third, second)
                await until(lambda: third.knows(*nodes))


async def test_a_standby_says_who_is_active_and_changes_nothing() -> None:
    first, second = two_alike()
    async with running(first):
        await until(lambda: first.leadership.is_active)
        async with running(second), nodes_at(first):
            await stands_by(second, first)
            async with second.http.get("/health") as answer:
                assert answer.status == 503
                assert await answer.json() == {"status": "standby", "active": first.url}
            for path, body in (("/generate", GENERATE), ("/v1/chat/completions", {})):
                async with second.http.post(path, json=body) as answer:
                    assert answer.status == 503 and answer.headers["retry-after"] == "1"
                    assert first.url in (await answer.json())["error"]["message"]
            for path in ("/admin/drain", "/admin/policy", "/workers", "/flush_cache"):
                assert (await ask(second, path))[0] == 503
            await until(lambda: second.services.registry.nodes)
            for path in ("/metrics", "/dashboard", "/workers", "/admin/cluster", "/admin/history"):
                async with second.http.get(path) as answer:
                    assert answer.status == 200, path
            node = StubNode(cast(StubCluster, second), Role.READER, "r0")
            with pytest.raises(AssertionError, match="not the active one"):
                await node.join()
            await node.close()


async def test_a_standby_that_cannot_take_all_that_it_is_told_takes_over_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = two_alike()
    async with running(first):
        await until(lambda: first.leadership.is_active)
        async with running(second), nodes_at(first) as nodes:
            await until(lambda: second.knows(*nodes))
            told = []

            def failing(orders: Any) -> None:
                told.append(orders)
                raise RuntimeError("a bug")

            monkeypatch.setattr(second.services.orders, "mirror", failing)
            await until(lambda: len(told) > 1)
            await ends(first, second)
            await generate(second)


async def test_of_two_that_start_together_one_becomes_active() -> None:
    first, second = two_alike()
    async with running(first, second):
        await until(lambda: first.leadership.is_active or second.leadership.is_active)
        active, standby = (first, second) if first.leadership.is_active else (second, first)
        await stands_by(standby, active)
        assert standby.app.state.standby.watch.term == active.leadership.term


async def test_two_that_did_not_see_each_other_leave_it_to_the_one_that_serves() -> None:
    first = Gateway(free_port(), [])
    second = Gateway(free_port(), [NOBODY])
    async with running(first, second), nodes_at(first):
        await until(lambda: second.leadership.is_active)
        assert second.leadership.term > first.leadership.term
        second.app.state.standby._urls = [first.url]  # it is reached by now
        await asyncio.wait_for(second.superseded.wait(), 30)
        assert first.leadership.is_active
