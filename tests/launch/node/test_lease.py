"""A lease is renewed, joined for again where it is unknown, drained and given back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from common.cluster.membership import (
    AgentAddress,
    JoinRequest,
    LeaveRequest,
    NodeMembers,
    Renewal,
    RestartRequest,
    Role,
    State,
)
from launch.access import Access
from launch.cluster.process_record import HealthCheck, ProcessRecord
from launch.cluster.supervisor import Start
from launch.node import lease as lease_module
from launch.node.lease import Lease, Refused, Unreachable
from launch.node.numbers import GrantedNumbers
from tests.launch.node.registry_stub import StubRegistry, refusal

MEMBERS = NodeMembers(AgentAddress("agent-p7", "tcp://10.0.0.7:30100"))
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEW_S", 0.1)
    monkeypatch.setattr(lease_module, "JOIN_AGAIN_S", 0.02)


@contextlib.asynccontextmanager
async def lease_at(*urls: str, keep: bool = True) -> AsyncIterator[Lease]:
    request = JoinRequest(Role.PREFILL, session="session-1", settings={"--transfer": "tcp"})
    lease = Lease(urls, Access("token"), request)
    keeping = None
    try:
        if keep:
            await lease.join(timeout_s=20)
            keeping = asyncio.create_task(lease.keep())
        yield lease
    finally:
        if keeping is not None:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
        await lease.close()


async def test_a_node_is_named_and_tells_where_it_is():
    async with StubRegistry() as registry, lease_at(NOBODY, registry.url) as lease:
        assert lease.joined is not None and lease.joined.name == "p7"
        lease.tell(MEMBERS)
        await registry.until(lambda: any(r.members == MEMBERS for r in registry.of(Renewal)))
        assert registry.of(JoinRequest)[0].settings == {"--transfer": "tcp"}
        await lease.leave()
        assert registry.of(LeaveRequest) and not registry.leases


async def test_an_unknown_lease_is_joined_for_again_with_all_that_it_had():
    async with StubRegistry() as registry, lease_at(registry.url) as lease:
        lease.tell(MEMBERS)
        lease.started(2500, turn=3)
        await registry.until(lambda: len(registry.of(Renewal)) >= 2)
        registry.forget()  # as a gateway that was started anew
        await registry.until(lambda: len(registry.of(JoinRequest)) == 2)
        again = registry.of(JoinRequest)[1]
        assert (again.name, again.session, again.members) == ("p7", "session-1", MEMBERS)
        assert (again.incarnation, again.turn, again.plan) == (2500, 3, 77)
        renewals = len(registry.of(Renewal))
        await registry.until(lambda: len(registry.of(Renewal)) > renewals)
        assert registry.of(Renewal)[-1].lease in registry.leases


async def test_a_drain_ends_when_nothing_needs_the_node_any_more():
    async with StubRegistry() as registry, lease_at(registry.url) as lease:
        draining = asyncio.create_task(lease.drained(timeout_s=20))
        await registry.until(
            lambda: sum(r.state is State.DRAINING for r in registry.of(Renewal)) >= 3
        )
        assert not draining.done()
        registry.idle = True
        assert await asyncio.wait_for(draining, 20)


async def test_a_drain_ends_in_time_and_does_not_wait_for_a_gateway_that_is_gone(monkeypatch):
    async with StubRegistry() as registry, lease_at(registry.url) as lease:
        assert not await lease.drained(timeout_s=0.3)
    monkeypatch.setattr(lease_module, "EXPIRY_S", 0.3)
    async with lease_at(NOBODY, keep=False) as lease:
        assert not await asyncio.wait_for(lease.drained(timeout_s=600), 20)


async def test_who_is_refused_is_told_why():
    async with StubRegistry() as registry, lease_at(registry.url, keep=False) as lease:
        registry.refusals = [refusal(409, "--transfer is rdma there")]
        with pytest.raises(Refused, match="--transfer is rdma there"):
            await lease.join(timeout_s=20)


async def test_a_name_whose_lease_runs_out_is_waited_for():
    async with StubRegistry() as registry, lease_at(registry.url, keep=False) as lease:
        registry.refusals = [refusal(409, "p7 is held", retry_after="2") for _ in range(3)]
        assert (await lease.join(timeout_s=20)).name == "p7"
        assert len(registry.of(JoinRequest)) == 4


async def test_a_gateway_that_starts_later_is_waited_for_but_not_for_ever():
    async with lease_at(NOBODY, keep=False) as lease:
        with pytest.raises(Unreachable):
            await lease.join(timeout_s=0.1)
    async with StubRegistry() as registry, lease_at(registry.url, keep=False) as lease:
        registry.refusals = [refusal(503, "not yet") for _ in range(3)]
        assert (await lease.join(timeout_s=20)).lease in registry.leases


def record(kind: str) -> ProcessRecord:
    check = HealthCheck("http", "")
    return ProcessRecord(kind, kind, (), {}, "", {}, (check,), check)


async def test_starts_are_numbered_by_the_gateway_or_by_the_time_since_it_was_asked():
    async with StubRegistry() as registry, lease_at(registry.url) as lease:
        joined = lease.joined
        assert joined is not None
        numbers = GrantedNumbers(lease, Start(joined.incarnation, joined.turn))
        first = await numbers.next_start(record("engine"), 0)
        assert first == await numbers.next_start(record("agent"), 0) == (2000, 3)
        second = await numbers.next_start(record("engine"), 1)
        assert second == (3000, 4)
        assert registry.of(RestartRequest)[0].ended == 2000
        registry.refusals = [refusal(503, "not now")]
        third = await numbers.next_start(record("engine"), 2)
        assert third.incarnation > second.incarnation and third.turn == 5
        agent = await numbers.next_start(record("agent"), 1)
        assert agent.incarnation > 2000 and agent.turn == 4
        assert len(registry.of(RestartRequest)) == 2, "an agent's are its own"
