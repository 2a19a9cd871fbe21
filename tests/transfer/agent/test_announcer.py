"""What subscribers are told, message by message."""

from __future__ import annotations

import asyncio

import pytest

from common.block import TierName
from common.ids import Incarnation
from common.loads import AgentLoad
from common.messages.from_agents import AgentStatus, Holding
from tests.transfer.agent.fake_engine import key_of
from transfer.agent import announcer
from transfer.agent.announcer import Announcer


def changes(blocks: range) -> list[Holding]:
    return [Holding(key_of(block), TierName.DRAM, True) for block in blocks]


@pytest.fixture
def sent():
    return []


@pytest.fixture
def announce(sent):
    def send(identity: bytes, message) -> bool:
        sent.append((identity, message))
        return identity != b"gone"

    return Announcer(Incarnation(7), send)


async def test_a_large_snapshot_comes_in_parts_with_one_numbering(announce, sent, monkeypatch):
    monkeypatch.setattr(announcer, "CHANGES_MAX", 10)
    announce.subscribe(b"g", changes(range(25)))
    announce.note(changes(range(25, 26))[0])
    announce.note(changes(range(26, 27))[0])
    assert len(sent) == 3  # changes are gathered
    await asyncio.sleep(0.05)
    messages = [message for _, message in sent]
    assert [m.sequence for m in messages] == [0, 1, 2, 3]
    assert [m.snapshot for m in messages] == [True, False, False, False]
    told = [holding.key for m in messages for holding in m.changes]
    assert told == [key_of(block) for block in range(27)]


async def test_changes_before_a_subscription_are_not_told_after_its_snapshot(announce, sent):
    announce.note(changes(range(1))[0])
    announce.subscribe(b"g", changes(range(1)))
    await asyncio.sleep(0.05)
    assert [message.sequence for _, message in sent] == [0]


async def test_a_subscriber_that_is_gone_is_forgotten(announce, sent):
    announce.subscribe(b"gone", [])
    announce.subscribe(b"g", [])
    sent.clear()
    announce.note(changes(range(1))[0])
    await asyncio.sleep(0.05)
    assert [identity for identity, _ in sent] == [b"g"]


async def test_an_unchanged_status_is_told_once_a_second(announce, sent):
    announce.subscribe(b"g", [])
    sent.clear()
    for free in (3, 3, 3, 2, 2):
        announce.status(AgentStatus(AgentLoad("a0", Incarnation(7), {}, {}, 0, 0.0, 4, free), []))
    assert [message.load.dram_slots_free for _, message in sent] == [3, 2]
