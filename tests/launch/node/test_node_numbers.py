"""Numbers of the starts of an engine's ranks, on all of its hosts the same."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, cast

from common.cluster.membership import Restarted
from common.ids import Incarnation
from launch.cluster.process_record import HealthCheck, ProcessRecord
from launch.cluster.supervisor import Start
from launch.node import numbers as numbers_module
from launch.node.numbers import GrantedNumbers

CHECK = HealthCheck("http", "http://127.0.0.1:1/")
ENGINE = ProcessRecord("p0-1", "engine", (), {}, "h", {}, (CHECK,), CHECK, together="p0")
AGENT = replace(ENGINE, name="agent-p0-1", kind="agent", together="")


class Lease:
    """Answers what the test says."""

    def __init__(self) -> None:
        self.wanted = Incarnation(100)
        self.answers: list[Restarted | None] = []
        self.asked: list[int] = []
        self.told: list[int] = []

    async def restart(self, ended: int) -> Restarted | None:
        self.asked.append(ended)
        return self.answers.pop(0)

    def started(self, incarnation: int, turn: int) -> None:
        self.told.append(incarnation)


def numbers_of(lease: Lease) -> GrantedNumbers:
    granted = Start(Incarnation(100), 3)
    return GrantedNumbers(cast(Any, lease), granted, is_of_several_hosts=True)


async def test_ranks_wait_for_the_number_that_all_hosts_have(monkeypatch):
    monkeypatch.setattr(numbers_module, "LOOK_S", 0.01)
    lease = Lease()
    numbers = numbers_of(lease)
    assert await numbers.next_start(ENGINE, 0) == Start(Incarnation(100), 3)
    lease.answers = [None, Restarted(Incarnation(200), 4)]
    assert await numbers.next_start(ENGINE, 1) == Start(Incarnation(200), 4)
    assert lease.asked == [100, 100]


async def test_what_the_lease_says_of_a_host_is_its_ranks_number_alone():
    lease = Lease()
    numbers = numbers_of(lease)
    for record in (ENGINE, AGENT):
        await numbers.next_start(record, 0)
    assert (await numbers.next_start(AGENT, 1)).incarnation > 100
    assert lease.told == [100]


async def test_a_host_hears_that_another_s_ranks_have_ended(monkeypatch):
    monkeypatch.setattr(numbers_module, "LOOK_S", 0.01)
    lease = Lease()
    numbers = numbers_of(lease)
    start = await numbers.next_start(ENGINE, 0)
    waiting = asyncio.create_task(numbers.overtaken(ENGINE, start))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    lease.wanted = Incarnation(200)
    assert "other hosts" in await asyncio.wait_for(waiting, 20)
