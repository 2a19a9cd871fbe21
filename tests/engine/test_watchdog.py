"""What ends without a message: jobs of dead agents, late plans, an engine full of quarantine."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest
import torch

from common.ids import Incarnation
from common.messages.from_agents import Fenced
from common.messages.from_engines import AskFence, Deliver
from common.messages.from_gateway import EndPlan
from engine import watchdog
from engine.ranks.group import CutConnections, FindConnections
from engine.streams import PASSED, HostPages
from engine.transfers.fence import Fences, RankConnections
from engine.watchdog import Watchdog
from tests.engine.parts import Parts, Request


@pytest.fixture
def ended(monkeypatch) -> list[str]:
    ended: list[str] = []
    monkeypatch.setattr(watchdog, "end_engine", lambda: ended.append("engine"))
    return ended


def looked_after(engine: Parts, quarantined_pages_max: float = 2.0) -> list[EndPlan]:
    posted: list[EndPlan] = []
    fences = engine.fences
    Watchdog(engine.jobs, fences, engine.plans, posted.append, quarantined_pages_max).look()
    return posted


def test_a_plan_past_its_deadline_is_ended_at_every_rank(ended):
    engine = Parts("decode")
    engine.plan(Request("late", list(range(9))), 2, deadline_s=0.0)
    engine.plan(Request("r", list(range(9))), 2)
    assert [plan.rid for plan in looked_after(engine)] == ["late"]
    assert engine.plans.get("late") is not None  # until the event takes effect


@pytest.mark.parametrize(
    ("pages", "within_s", "ends"), [(2, 0.0, []), (3, 0.0, ["engine"]), (3, 60.0, [])]
)
def test_an_engine_with_too_many_pages_in_quarantine_ends_if_no_fence_passes(
    ended, monkeypatch, pages, within_s, ends
):
    monkeypatch.setattr(watchdog, "FENCED_WITHIN_S", within_s)
    engine = Parts("decode")
    for page in range(pages):
        engine.jobs.open("a", Incarnation(5), [page + 1], -1.0, lambda reason: None)
    engine.jobs.open("a", Incarnation(5), [9], 60.0, lambda reason: None)  # not overdue
    looked_after(engine)
    assert ended == ends


def test_jobs_of_a_dead_agent_are_ended_when_its_successor_has_answered(ended):
    engine = Parts("decode")
    reasons: list[str] = []
    engine.jobs.open("a", Incarnation(5), [1], 60.0, reasons.append)
    engine.jobs.agent_restarted("a", Incarnation(6))
    looked_after(engine)
    ((agent, asked),) = engine.links.of(AskFence)
    assert agent == "a" and reasons == [] and engine.holds.held_pages() == [1]
    engine.fences.answered("a", Fenced(asked.number, ["127.0.0.1"], []))
    looked_after(engine)
    assert reasons == ["agent a died"] and engine.holds.held_pages() == []


def test_one_of_its_name_on_another_host_is_no_successor(ended):
    engine = Parts("decode")
    reasons: list[str] = []
    engine.links.hosts["a"] = "10.0.0.1"
    engine.jobs.open("a", Incarnation(5), [1], 60.0, reasons.append)
    engine.links.hosts["a"] = "10.0.0.2"
    engine.jobs.agent_restarted("a", Incarnation(6))
    looked_after(engine)
    assert not engine.links.of(AskFence) and engine.holds.held_pages() == [1]
    engine.links.hosts["a"] = "10.0.0.1"  # back where it was
    engine.jobs.agent_restarted("a", Incarnation(7))
    looked_after(engine)
    ((_, asked),) = engine.links.of(AskFence)
    engine.links.hosts["a"] = "10.0.0.2"  # and away again, before it has answered
    looked_after(engine)
    engine.fences.answered("a", Fenced(asked.number, ["10.0.0.2"], []))
    looked_after(engine)
    assert engine.holds.held_pages() == [1]
    engine.links.hosts["a"] = "10.0.0.1"
    looked_after(engine)
    _, asked = engine.links.of(AskFence)[-1]
    engine.fences.answered("a", Fenced(asked.number, ["10.0.0.1"], []))
    looked_after(engine)
    assert reasons == ["agent a died"] and engine.holds.held_pages() == []


class Behind:
    """A mark that the device passes when the test says so."""

    elapsed_time = PASSED.elapsed_time

    def __init__(self) -> None:
        self.passed = threading.Event()

    def query(self) -> bool:
        return self.passed.is_set()

    def synchronize(self) -> None:
        assert self.passed.wait(20)


def test_a_job_that_stopped_while_it_waited_for_the_device_is_not_sent(ended):
    engine, behind = Parts("decode"), Behind()
    plan = engine.plan(Request("r", list(range(9))), 2)
    delivery = engine.deliveries.start(plan, 0, HostPages(torch.tensor([3, 4]), 1), behind)
    engine.jobs.agent_restarted("a", Incarnation(6))
    behind.passed.set()
    delivery.send()
    assert not engine.links.of(Deliver) and engine.holds.held_pages() == [3, 4]
    looked_after(engine)
    ((_, asked),) = engine.links.of(AskFence)
    assert asked.jobs == [writer.job for writer in delivery.writers]


@pytest.mark.parametrize("is_live", [False, True])
def test_a_connection_opened_since_the_agent_s_answer_is_not_cut(is_live):
    engine = Parts("decode")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        fences = engine.fences_of(port)
        job = engine.jobs.open("a", Incarnation(5), [1], 60.0, lambda reason: None)
        engine.jobs.agent_restarted("a", Incarnation(6))
        fences.look()
        with socket.create_connection(("127.0.0.1", port)) as link, server.accept()[0]:
            end = ("127.0.0.1", link.getsockname()[1])
            fences.answered("a", Fenced(1, ["127.0.0.1"], []))
            fences.answered("a", Fenced(1, ["127.0.0.1"], []))  # it had been asked twice
            fences.look()
            assert not engine.cuts and engine.links.of(AskFence)[-1] == ("a", AskFence(2, [job]))
            fences.answered("a", Fenced(2, ["127.0.0.1"], [end] if is_live else []))
            fences.look()
            assert bool(engine.cuts) != is_live
            assert engine.holds.held_pages() == ([] if is_live else [1])


def test_each_rank_cuts_what_leads_to_itself_before_pages_come_back():
    """On another host the leader sees no connection of a rank, and another's may have its port."""
    engine = Parts("decode")
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        ranks = [RankConnections(server.getsockname()[1]) for server in servers]

        def at_ranks(event: FindConnections | CutConnections) -> None:
            if isinstance(event, FindConnections):
                fences.found(event, [rank.find(event.hosts, event.live) for rank in ranks])
            else:
                pairs = zip(ranks, event.late, strict=True)
                fences.were_cut(event, [rank.cut(late) for rank, late in pairs])

        fences = Fences(engine.jobs, engine.links, at_ranks)
        link = stack.enter_context(socket.create_connection(servers[1].getsockname()))
        taken = stack.enter_context(servers[1].accept()[0])
        engine.jobs.open("a", Incarnation(5), [1], 60.0, lambda reason: None)
        engine.jobs.agent_restarted("a", Incarnation(6))
        fences.look()
        fences.answered("a", Fenced(1, ["127.0.0.1"], []))
        fences.answered("a", Fenced(2, ["127.0.0.1"], []))
        fences.look()
        assert engine.holds.held_pages() == [1] and fences.cut_total == 1
        with pytest.raises(OSError):
            taken.getpeername()
        taken.close()
        link.close()
        for _ in range(2):
            fences.look()
        assert engine.holds.held_pages() == []


def test_a_look_that_fails_is_not_the_last_one(monkeypatch):
    engine = Parts("decode")
    monkeypatch.setattr(watchdog, "_LOOK_EVERY_S", 0.01)
    looks, looked_again = [], threading.Event()

    def expired():
        looks.append(1)
        if len(looks) == 1:
            raise OSError(24, "Too many open files")
        looked_again.set()
        return []

    monkeypatch.setattr(engine.plans, "expired", expired)
    Watchdog(engine.jobs, engine.fences, engine.plans, lambda event: None, 2.0).start()
    assert looked_again.wait(20)
