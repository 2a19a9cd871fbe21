"""Engines that an agent hears of while it runs, and those that leave."""

from __future__ import annotations

import socket
import time

from common.ids import JobId
from common.messages.from_agents import UnknownEngine
from common.messages.from_engines import PullBlocks
from common.messages.from_gateway import KnownEngines, Subscribe
from tests.transfer.agent.agent_process import FakeGateway, running_agent
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


def test_the_ports_of_an_agent_hear_hosts_of_members_until_they_have_left(tmp_path):
    with running_agent(tmp_path, heard=["10.0.0.0/8"]) as agent:
        gateway = FakeGateway(agent.control)
        gateway.send(Subscribe())
        port = int(gateway.hello().session_id.rpartition(":")[2])
        assert not is_heard(port)
        gateway.send(KnownEngines(5, ["d0"], complete=False, hosts=["127.0.0.1"]))
        gateway.status(lambda status: status.heard == 5)
        assert is_heard(port)
        gateway.send(KnownEngines(6, ["d0"], complete=True, hosts=["127.0.0.2"]))
        gateway.status(lambda status: status.heard == 6)
        assert not is_heard(port)
        gateway.close()


def is_heard(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=0.5).close()
    except TimeoutError:
        return False
    return True


def unknown_jobs(engine) -> list[JobId]:
    return [message.job for _, message in engine.messages if isinstance(message, UnknownEngine)]


def wait_until(holds) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
