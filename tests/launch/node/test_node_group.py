"""Hosts of one engine at a gateway: their ranks begin with one number, and anew together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from common.cluster.membership import (
    TOKEN_PURPOSE,
    AgentAddress,
    HostOfGroup,
    JoinRequest,
    NodeMembers,
    Role,
)
from launch.access import Access
from launch.cluster.supervisor import Start
from launch.node import lease as lease_module
from launch.node import numbers as numbers_module
from launch.node.lease import Lease, new_session
from launch.node.numbers import GrantedNumbers
from tests.control import SECRET
from tests.launch.gateway.stubs import StubCluster, running_cluster
from tests.launch.node.test_node_numbers import ENGINE
from transfer.control.keys import derived

TIMEOUT_S = 20
HOSTS = 2


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEW_S", 0.1)
    monkeypatch.setattr(numbers_module, "LOOK_S", 0.02)


@contextlib.asynccontextmanager
async def host_at(url: str, rank: int) -> AsyncIterator[tuple[Lease, GrantedNumbers]]:
    """One that has joined, and renews its lease."""
    name = f"p7-{rank}" if rank else "p7"
    members = NodeMembers(AgentAddress(f"agent-{name}", f"tcp://127.0.0.1:{30100 + rank}"))
    group = HostOfGroup("p7", rank, HOSTS)
    request = JoinRequest(Role.PREFILL, new_session(), name, members, group=group)
    lease = Lease([url], Access(derived(SECRET, TOKEN_PURPOSE)), request)
    joined = await lease.join(TIMEOUT_S)
    keeping = asyncio.create_task(lease.keep())
    try:
        yield (
            lease,
            GrantedNumbers(lease, Start(joined.incarnation, joined.turn), is_of_several_hosts=True),
        )
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await lease.leave()
        await lease.close()


def url_of(cluster: StubCluster) -> str:
    return f"http://127.0.0.1:{cluster.config.port}"


async def test_ranks_on_two_hosts_begin_with_one_number_and_anew_together() -> None:
    async with (
        running_cluster() as cluster,
        host_at(url_of(cluster), 0) as (first_lease, first),
        host_at(url_of(cluster), 1) as (second_lease, second),
    ):
        begun = await first.next_start(ENGINE, 0)
        assert await second.next_start(ENGINE, 0) == begun
        overtaken = asyncio.create_task(first.overtaken(ENGINE, begun))
        await cluster.until(lambda: first_lease.wanted == second_lease.wanted == begun.incarnation)
        anew = await second.next_start(ENGINE, 1)  # its ranks have ended
        assert anew.incarnation > begun.incarnation and anew.turn != begun.turn
        await asyncio.wait_for(overtaken, TIMEOUT_S)
        assert await first.next_start(ENGINE, 1) == anew
        await cluster.until(lambda: second_lease.wanted == anew.incarnation)
        still = asyncio.create_task(second.overtaken(ENGINE, anew))
        await asyncio.sleep(0.5)
        assert not still.done()
        still.cancel()
