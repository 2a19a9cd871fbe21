"""The quota benchmark: its lengths, its estimates, and what it makes of engines' logs."""

from __future__ import annotations

import pytest

from benchmarks.quota import estimate
from benchmarks.quota.__main__ import goals
from benchmarks.quota.engines import Client, Engine, Group, groups
from benchmarks.quota.estimate import GPU, Estimated
from benchmarks.quota.measure import Batch, Measured, Round, throughput_ratios
from benchmarks.quota.workload import chunks_of, scaled
from benchmarks.trace import TraceRequest
from scheduler.quota import Chunk

NAMES = 7


def test_blocks_of_earlier_requests_are_cached_and_a_token_is_always_new():
    requests = [
        TraceRequest(0, 0, 1000, 1, (1, 2)),
        TraceRequest(1, 0, 1500, 1, (1, 2, 3)),
        TraceRequest(2, 0, 1000, 1, (1, 2)),
    ]
    assert chunks_of(requests) == [Chunk(0, 1000), Chunk(1024, 476), Chunk(960, 40)]
    assert scaled(Chunk(1024, 476), 8, 8192, 4096) == Chunk(128, 59)


def test_every_rank_s_batches_are_counted_until_all_is_packed():
    requests = [Chunk(6400, 900)] * 30
    found = estimate.run(requests, 3, GPU, 0.02, 8192)
    assert found.largest_s <= 0.02
    assert found.steps >= 30 * 900 * 6400 * GPU.pair_s / 0.02 / 3
    assert 1 <= found.max_avg < 1.1
    pair = estimate.compare([Chunk(0, 500), Chunk(40_000, 4000)] * 20, 2)
    assert pair["quota"].max_avg < pair["fixed"].max_avg


def batch(attention_s: float, estimated_s: float = 0.1, full: bool = True) -> Batch:
    return Batch(1, 512, 1024, full, estimated_s, attention_s, 2 * attention_s)


def test_full_batches_of_the_ranks_are_compared_in_order():
    ranks = [[batch(0.1), batch(0.01, full=False), batch(0.2)], [batch(0.3), batch(0.2)]]
    turn = Round("quota", 1000, 2.0, 1.0, ranks)
    measured = Measured.of([turn])
    assert measured.max_avg == pytest.approx((0.3 + 0.2) / (0.2 + 0.2))
    assert (measured.batches, measured.full_batches_compared) == (5, 4)
    assert measured.error_median == pytest.approx(0.5)
    turns = [turn, Round("fixed", 1000, 4.0, 1.0, ranks)]
    assert throughput_ratios(turns, lambda turn: turn.seconds) == [2.0]


def test_the_log_of_an_engine_is_read_once(tmp_path):
    log = tmp_path / "p.log"
    log.write_text(
        "[x] prefill batch requests=2 new_tokens=700 context_tokens=640 quota_s=0.2 full=1 "
        "estimated_s=0.190000 attention_s=0.210000 forward_s=0.400000\nsomething else\n"
    )
    client = Client(None, None, None)
    group = Group("quota", [Engine(None, log)], 8192)
    assert client.batches(group) == [[Batch(2, 700, 640, True, 0.19, 0.21, 0.4)]]
    assert client.batches(group) == [[]]


def test_every_goal_is_there_though_nothing_was_measured():
    rows = goals(Estimated(2, 1, 1, 1.0, 1.0, 1.0, 0.3), None, [])
    assert len({row.name for row in rows}) == NAMES
    assert [row.holds for row in rows] == [True, True] + [False] * (NAMES - 2)


def test_engines_of_both_arms_are_the_launcher_s_without_agents(tmp_path):
    arms, decode = groups(30000, tmp_path, quota_ms=200.0, fixed_tokens=896, tokens_max=8192)
    names = [engine.record.name for arm in arms for engine in arm.engines]
    assert names == ["quota-0", "quota-1", "fixed-0", "fixed-1"]
    assert decode.record.name == "decode"
