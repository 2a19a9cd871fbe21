"""Engines that an agent hears of while it runs, and those that leave."""

from __future__ import annotations

import time

from common.cluster.known import KnownEngines
from common.ids import JobId
from common.messages import PullBlocks, UnknownEngine
from tests.transfer.agent.fake_engine import key_of


def pull(engine, job: int) -> None:
    engine.fill_all(range(2), 0)
    engine.send("a0", PullBlocks(JobId(job), [key_of(0), key_of(1)], [0, 1], 10.0))


def test_an_engine_registers_once_the_agent_has_heard_of_it_and_no_more_once_it_has_left(
    agent, gateway, start_engine
):
    gateway.send(KnownEngines(5, ["newcomer"], complete=False))
    gateway.status(lambda status: status.heard == 5)
    first, newcomer = start_engine("d0"), start_engine("newcomer")
    for job, engine in enumerate((first, newcomer), start=1):
        pull(engine, job)
        assert engine.wait_end(job).held == [True, True]
    gateway.send(KnownEngines(6, ["d0"], complete=True))
    gateway.status(lambda status: status.heard == 6)
    pull(first, 3)
    assert first.wait_end(3).held == [True, True]
    for job in (4, 5):  # it registers again after the first, which is of no use
        pull(newcomer, job)
        wait_until(lambda job=job: JobId(job) in unknown_jobs(newcomer))
    assert "newcomer has left the cluster" in agent.log()


def unknown_jobs(engine) -> list[JobId]:
    return [message.job for _, message in engine.messages if isinstance(message, UnknownEngine)]


def wait_until(holds) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
