"""A real agent process serves real engine processes over Mooncake TCP."""

from __future__ import annotations

import math
import random
import signal
import socket
import subprocess
import time

import pytest

from common.block import BlockLayout
from common.board_word import BOARD_WORD_BYTES, FAILED
from common.ids import BoardSlot, JobId, PlanId
from common.messages.codec import PROTOCOL, encode
from common.messages.fields import Ping
from common.messages.from_agents import Announcement, Fenced, JobEnded, ShareRead, UnknownEngine
from common.messages.from_engines import AskFence, CancelJob, Deliver, PlanAccepted, PullBlocks
from common.messages.from_gateway import ReadShare, ReleasePlan, Subscribe
from tests.samples import by_name
from tests.transfer.agent.agent_process import AgentProcess, FakeGateway
from tests.transfer.agent.fake_engine import LAYOUT, content_of, key_of

LAYERS = LAYOUT.num_layers


def pull(engine, job: int, blocks: range, pages: range | None = None, deadline_s=10.0):
    keys = [key_of(block) for block in blocks]
    engine.send("a0", PullBlocks(JobId(job), keys, list(pages or blocks), deadline_s))


def store(engine, job: int, blocks: range) -> None:
    """Fill pages with blocks and have the agent take them."""
    engine.fill_all(blocks, blocks.start)
    pull(engine, job, blocks)
    assert engine.wait_end(job).held == [True] * len(blocks)


def deliver(engine, job: int, plan: int, blocks: range, pages: range, slot: int = 0, **fields):
    keys = [key_of(block) for block in blocks]
    how = {"urgent": True, "deadline_s": 10.0, **fields}
    engine.send("a0", Deliver(JobId(job), PlanId(plan), keys, list(pages), BoardSlot(slot), **how))


def assert_delivered(engine, pages: range, blocks: range) -> None:
    for page, block in zip(pages, blocks, strict=True):
        assert engine.page_bytes(page) == content_of(block), f"page {page}"


def test_what_one_engine_computed_reaches_another(agent, gateway, start_engine):
    decode, prefill = start_engine("d0"), start_engine("p0")
    store(decode, 1, range(10))
    assert gateway.holdings(10, "dram") == {key_of(block) for block in range(10)}
    share = gateway.read(7, range(10))
    assert share.in_dram == [True] * 10 and not share.read_bytes
    deliver(prefill, 5, 7, range(10), range(20, 30), slot=3)
    assert prefill.wait_end(5).error == ""
    assert prefill.board(3) == (5, LAYERS)
    assert_delivered(prefill, range(20, 30), range(10))
    delivered = 'dualpath:agent_delivered_bytes_total{engine="p0"}'
    volatile = 'dualpath:agent_blocks{state="volatile"}'
    status = gateway.status(
        lambda s: delivered in by_name(s.samples) and by_name(s.samples)[volatile] == 0
    )
    counters = by_name(status.samples)
    size = 10 * LAYOUT.block_bytes
    assert counters["dualpath:agent_pulled_bytes_total"] == size
    assert counters[delivered] == size
    assert counters['dualpath:agent_deliveries_total{outcome="ok"}'] == 1
    assert counters['dualpath:agent_blocks{state="durable"}'] == 10
    assert counters['dualpath:agent_storage_write_bytes_total{tier="ssd"}'] == size
    moved = (
        'dualpath:agent_moved_bytes_total{{class="{}",operation="{}",nic="lo",peer="127.0.0.1"}}'
    )
    assert counters[moved.format("high", "read")] == size
    assert counters[moved.format("low", "write")] == size + LAYERS * BOARD_WORD_BYTES


@pytest.mark.slow
def test_a_killed_agent_comes_back_and_reads_its_blocks_from_ssd(agent, gateway, start_engine):
    engine = start_engine("d0")
    before = engine.wait_alive("a0")
    store(engine, 1, range(8))
    gateway.holdings(8, "ssd")
    agent.kill()
    agent.start()
    assert engine.wait_alive("a0", incarnation=before) > before
    share = gateway.read(9, range(8))
    assert share.in_dram == [True] * 8
    assert share.read_bytes == {"ssd": 8 * LAYOUT.block_bytes}
    deliver(engine, 2, 9, range(8), range(30, 38))
    assert engine.wait_end(2).error == ""
    assert_delivered(engine, range(30, 38), range(8))


def test_a_delivery_of_blocks_that_are_not_there_fails_at_once(gateway, start_engine):
    engine = start_engine("p0")
    store(engine, 1, range(3))
    gateway.read(4, range(3))
    deliver(engine, 11, 4, range(2, 5), range(10, 13), slot=1)
    assert "2 of 3 blocks" in engine.wait_end(11, timeout_s=2).error
    assert engine.board(1) == (11, FAILED)
    # of another plan: nothing keeps the blocks there for it
    deliver(engine, 12, 5, range(3), range(10, 13), slot=2)
    assert engine.wait_end(12, timeout_s=2).error
    assert engine.page_bytes(10) == bytes(LAYOUT.block_bytes)


def test_a_delivery_past_its_deadline_fails(gateway, start_engine):
    engine = start_engine("p0")
    store(engine, 1, range(3))
    gateway.read(4, range(3))
    deliver(engine, 2, 4, range(3), range(10, 13), deadline_s=0.0)
    assert "deadline" in engine.wait_end(2, timeout_s=2).error
    assert engine.board(0) == (2, FAILED)


@pytest.mark.slow
def test_a_plan_is_released_at_its_deadline(gateway, start_engine):
    engine = start_engine("p0")
    store(engine, 1, range(3))
    gateway.read(4, range(3), deadline_s=0.3)
    time.sleep(0.6)
    deliver(engine, 2, 4, range(3), range(10, 13))
    assert "not in DRAM" in engine.wait_end(2).error


@pytest.mark.slow
@pytest.mark.parametrize("slots", [8])
def test_dram_for_less_than_two_shares_serves_both(gateway, start_engine, slots):
    engine = start_engine("d0")
    for first in (0, 6):
        store(engine, 1 + first, range(first, first + 6))
        durable = first + 6
        gateway.status(
            lambda s, n=durable: by_name(s.samples)['dualpath:agent_blocks{state="durable"}'] == n
        )
    assert gateway.read(1, range(6)).in_dram == [True] * 6
    gateway.send(ReadShare(PlanId(2), [key_of(block) for block in range(6, 12)], 10.0))
    deliver(engine, 20, 1, range(6), range(20, 26))
    assert engine.wait_end(20).error == ""
    assert_delivered(engine, range(20, 26), range(6))
    gateway.status(lambda s: by_name(s.samples)['dualpath:agent_plans{state="waiting"}'] == 1)
    gateway.send(ReleasePlan(PlanId(1)))
    share = gateway.wait(ShareRead)
    assert share.plan == 2 and share.in_dram == [True] * 6 and share.queue_s > 0
    deliver(engine, 21, 2, range(6, 12), range(30, 36))
    assert engine.wait_end(21).error == ""
    assert_delivered(engine, range(30, 36), range(6, 12))


def ask_then_stop(agent, engine, ask) -> None:
    """Suspend the engine after its message has left it and before the agent acts on it."""
    agent.process.send_signal(signal.SIGSTOP)
    ask()
    time.sleep(0.2)
    engine.process.send_signal(signal.SIGSTOP)
    agent.process.send_signal(signal.SIGCONT)


@pytest.mark.slow
def test_a_hung_engine_does_not_stop_the_others(agent, gateway, start_engine):
    hung, other = start_engine("p0"), start_engine("p1")
    store(other, 1, range(6))
    gateway.read(3, range(6))
    ask_then_stop(agent, hung, lambda: deliver(hung, 4, 3, range(6), range(20, 26)))
    for job in range(10, 20):
        started = time.monotonic()
        deliver(other, job, 3, range(6), range(20, 26))
        assert other.wait_end(job).error == ""
        assert time.monotonic() - started < 4.5  # a hung peer costs a worker 5 s
    assert_delivered(other, range(20, 26), range(6))
    failed = 'dualpath:agent_deliveries_total{outcome="failed"}'
    gateway.status(lambda s: by_name(s.samples)[failed] == 1)
    hung.process.send_signal(signal.SIGCONT)
    end = hung.wait_end(4)
    assert isinstance(end, JobEnded) and end.may_land and "failed with code" in end.error


@pytest.mark.slow
def test_a_pull_from_a_hung_engine_keeps_its_slots_out_of_use(agent, gateway, start_engine):
    hung, other = start_engine("d0"), start_engine("d1")
    hung.fill_all(range(5), 0)
    ask_then_stop(agent, hung, lambda: pull(hung, 4, range(5)))
    gateway.status(lambda s: by_name(s.samples)["dualpath:agent_quarantined_slots"] == 5)
    store(other, 1, range(10, 14))
    hung.process.send_signal(signal.SIGCONT)
    assert hung.wait_end(4).held == [False] * 5
    gateway.status(lambda s: by_name(s.samples)["dualpath:agent_quarantined_slots"] == 0)
    pull(hung, 6, range(5))
    assert hung.wait_end(6).held == [True] * 5


@pytest.mark.slow
def test_an_engine_killed_in_mid_delivery_leaves_nothing_behind(agent, gateway, start_engine):
    dying, other = start_engine("p0"), start_engine("p1")
    store(other, 1, range(6))
    gateway.read(3, range(6))
    ask_then_stop(agent, dying, lambda: deliver(dying, 4, 3, range(6), range(20, 26)))
    dying.kill()
    deliver(other, 5, 3, range(6), range(20, 26))
    assert other.wait_end(5).error == ""
    restarted = start_engine("p0", incarnation=2)
    deliver(restarted, 6, 3, range(6), range(30, 36))
    assert restarted.wait_end(6).error == ""
    assert_delivered(restarted, range(30, 36), range(6))
    gateway.send(ReleasePlan(PlanId(3)))
    status = gateway.status(lambda s: s.load.dram_slots_free == s.load.dram_slots)
    assert by_name(status.samples)['dualpath:agent_jobs{kind="delivery"}'] == 0


@pytest.mark.slow
def test_a_block_that_two_engines_offer_is_pulled_once(agent, gateway, start_engine):
    engines = [start_engine(name) for name in ("d0", "d1")]
    agent.process.send_signal(signal.SIGSTOP)
    for engine in engines:
        engine.fill_all(range(12), 0)
        pull(engine, 1, range(12))
    agent.process.send_signal(signal.SIGCONT)
    for engine in engines:
        assert engine.wait_end(1).held == [True] * 12
    size = 12 * LAYOUT.block_bytes
    pulled = "dualpath:agent_pulled_bytes_total"
    status = gateway.status(lambda s: by_name(s.samples)[pulled] >= size)
    assert by_name(status.samples)[pulled] == size


def test_a_job_number_is_used_once(gateway, start_engine):
    engine = start_engine("d0")
    for _ in range(2):
        store(engine, 1, range(2))
    gateway.read(3, range(2))
    for _ in range(3):
        deliver(engine, 2, 3, range(2), range(10, 12))
    engine.wait_end(2)
    deliver(engine, 4, 3, range(2), range(10, 12))
    engine.wait_end(4)
    assert sum(getattr(m, "job", 0) == 2 for _, m in engine.messages) == 1


def test_a_fence_gives_up_the_jobs_that_it_names_first(gateway, start_engine):
    engine = start_engine("d0")
    store(engine, 1, range(2))
    gateway.read(3, range(2))
    # in a layer window that gives no credits: it runs until it is given up
    deliver(engine, 2, 3, range(2), range(10, 12), first_position=5)
    running, late = JobId(2), JobId(4)
    engine.send("a0", AskFence(1, [running, late]))
    assert engine.wait_end(running).error
    engine.send("a0", AskFence(2, [running, late]))
    deliver(engine, late, 3, range(2), range(12, 14))
    deliver(engine, 5, 3, range(2), range(14, 16), slot=1)
    assert engine.wait_end(5).error == "" and not engine.has_ended(late)
    assert engine.page_bytes(12) == bytes(LAYOUT.block_bytes)
    told = [m for _, m in engine.messages if isinstance(m, Fenced) or getattr(m, "job", 0) == 2]
    assert isinstance(told[0], JobEnded) and told[-1].number == 2


@pytest.mark.slow
def test_what_is_no_message_is_counted_and_dropped(agent, gateway, start_engine):
    engine = start_engine("d0")
    noise = random.Random(1)
    frames = [noise.randbytes(noise.randrange(200)) for _ in range(50)]
    frames += [b"", PROTOCOL, b"DP0" + encode(Ping())[3:], encode(PlanAccepted(PlanId(1)))]
    frames += [encode(Ping())[:-1], encode(Ping()) + b"x"]
    for frame in frames:
        gateway.socket.send(frame)
    status = gateway.status(
        lambda s: by_name(s.samples)["dualpath:agent_malformed_messages_total"] >= len(frames)
    )
    assert by_name(status.samples)["dualpath:agent_malformed_messages_total"] == len(frames)
    engine.send("a0", PullBlocks(JobId(50), [key_of(1)], [1, 2], 10.0))
    assert engine.wait_end(50).held == [False]
    deliver(engine, 51, 1, range(3), range(1))
    assert engine.wait_end(51).error
    for job, page in ((52, 1 << 63), (53, -1)):
        engine.send("a0", PullBlocks(JobId(job), [key_of(1)], [page], math.nan))
        assert engine.wait_end(job).held == [False]
    store(engine, 1, range(2))


def test_jobs_of_a_stranger_are_answered_and_not_obeyed(agent, gateway):
    stranger = FakeGateway(agent.control, "p0")
    stranger.send(PullBlocks(JobId(5), [key_of(1)], [1], 10.0))
    assert stranger.wait(UnknownEngine).job == 5
    # the job may be running for an engine that has only reconnected
    stranger.send(CancelJob(JobId(5)))
    assert stranger.wait(UnknownEngine).job == 0
    stranger.close()
    assert gateway.read(1, range(3)).in_dram == [False] * 3


@pytest.mark.slow
def test_an_engine_with_blocks_of_another_size_is_refused(agent, gateway, start_engine):
    first = start_engine("d0")
    wide = start_engine("d1", layout=BlockLayout(4, 4, (8192, 8192)))
    pull(wide, 1, range(2))
    with pytest.raises(AssertionError, match="did not end"):
        wide.wait_end(1, timeout_s=1)
    assert any(isinstance(m, UnknownEngine) for _, m in wide.messages)
    assert "engine refused engine=d1" in agent.log()
    store(first, 1, range(2))


def test_announcements_are_numbered_for_each_subscriber(agent, gateway, start_engine):
    engine = start_engine("d0")
    assert (first := gateway.wait(Announcement)).snapshot and first.sequence == 0
    store(engine, 1, range(5))
    gateway.status(lambda s: by_name(s.samples)['dualpath:agent_blocks{state="durable"}'] == 5)
    numbers = [m.sequence for m in gateway.received if isinstance(m, Announcement)]
    gateway.received.clear()
    assert numbers == list(range(1, len(numbers) + 1))
    gateway.send(Subscribe())
    snapshot = gateway.wait(Announcement, lambda news: news.snapshot)
    assert snapshot.sequence == 0
    assert {(h.key, h.tier) for h in snapshot.changes} == {
        (key_of(block), tier) for block in range(5) for tier in ("dram", "ssd")
    }


@pytest.mark.slow
def test_sigterm_ends_the_agent_within_three_seconds(agent, gateway, start_engine):
    hung = start_engine("d0")
    hung.fill_all(range(5), 0)
    ask_then_stop(agent, hung, lambda: pull(hung, 4, range(5)))
    gateway.hello()
    assert agent.stop() < 3.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dram_bytes": 1 << 50}, "are available"),
        ({"dram_bytes": 0}, "DRAM"),
        ({"ssd_dirs": ["/proc/none"]}, "/proc/none"),
        ({"remote_url": "nonsense"}, "nonsense"),
    ],
)
def test_an_agent_that_cannot_start_says_why(tmp_path, settings, words):
    agent = AgentProcess(tmp_path, **settings)
    agent.start()
    assert agent.process.wait(15) == 2
    assert words in agent.log().splitlines()[-1]


def test_an_agent_whose_disk_broke_starts_again_without_it(tmp_path):
    (disk := tmp_path / "ssd").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a small tmpfs")
    agent = AgentProcess(tmp_path)
    try:
        agent.start()
        gateway = FakeGateway(agent.control)
        gateway.send(Subscribe())
        assert gateway.wait(Announcement, timeout_s=30).snapshot
        gateway.close()
        agent.stop()
        assert "goes on without an SSD tier" in agent.log() and "Read-only" in agent.log()
    finally:
        agent.kill()
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_busy_port_is_said(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        agent = AgentProcess(tmp_path, control=f"tcp://127.0.0.1:{taken.getsockname()[1]}")
        agent.start()
        assert agent.process.wait(15) == 2
        assert "cannot serve at" in agent.log().splitlines()[-1]
