"""Packing to the quota: what holds for every queue and every cost."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.prefill_cost import PrefillCost
from scheduler.quota import Chunk, QuotaBatch, pack
from tests.examples import examples

PAGE = 64

prices = st.builds(
    PrefillCost,
    base_s=st.floats(0, 0.02),
    request_s=st.floats(0, 0.01),
    token_s=st.floats(0, 1e-4),
    context_s=st.floats(0, 1e-5),
    pair_s=st.floats(1e-10, 1e-7),
    prefix_pair_s=st.floats(0, 1e-7),
    own_pair_s=st.floats(0, 1e-7),
    window_pair_s=st.floats(0, 1e-7),
    window_tokens=st.sampled_from([0, 128, 4096]),
)
quotas_s = st.floats(0.001, 1.0)
requests = st.builds(
    Chunk,
    context_tokens=st.integers(0, 500).map(lambda pages: pages * PAGE),
    new_tokens=st.integers(1, 20_000),
)
queues = st.lists(requests, min_size=1, max_size=12)


def seconds(cost: PrefillCost, chunks: list[Chunk]) -> float:
    """A batch's estimate, straight from the formula of the whole batch."""
    context, new = (np.array(column, float) for column in zip(*chunks, strict=True))
    return cost.batch_s(context, new)


def packed(
    queue: list[Chunk], cost: PrefillCost, quota_s: float, tokens_max: int = 16_384
) -> QuotaBatch:
    batch = QuotaBatch(cost, quota_s, PAGE)
    pack(queue, batch, tokens_max)
    return batch


def advance(queue: deque[Chunk], batch: QuotaBatch) -> None:
    """The batch has run: what it computed is cached."""
    for chunk in batch.chunks:
        head = queue.popleft()
        if left := head.new_tokens - chunk.new_tokens:
            queue.appendleft(Chunk(head.context_tokens + chunk.new_tokens, left))


@examples(300)
@given(queues, prices, quotas_s)
def test_a_batch_is_a_prefix_of_the_queue_cut_at_its_end_alone(queue, cost, quota_s):
    chunks = packed(queue, cost, quota_s).chunks
    assert chunks
    for chunk, request in zip(chunks, queue, strict=False):
        assert chunk.context_tokens == request.context_tokens
        assert 0 < chunk.new_tokens <= request.new_tokens
    assert all(c == r for c, r in zip(chunks[:-1], queue, strict=False))
    if chunks[-1] != queue[len(chunks) - 1]:
        assert sum(chunks[-1]) % PAGE == 0, "a cut ends on a page"


@examples(300)
@given(queues, prices, quotas_s)
def test_the_quota_is_exceeded_by_a_single_page_at_most(queue, cost, quota_s):
    batch = packed(queue, cost, quota_s)
    assert batch.spent_s == pytest.approx(seconds(cost, batch.chunks))
    if batch.spent_s > quota_s * (1 + 1e-9):
        assert len(batch.chunks) == 1 and batch.chunks[0].new_tokens <= PAGE


@examples(300)
@given(queues, prices, quotas_s)
def test_what_is_left_of_the_quota_has_no_room_for_another_page(queue, cost, quota_s):
    batch = packed(queue, cost, quota_s, tokens_max=10**9)
    *rest, last = batch.chunks
    request = queue[len(batch.chunks) - 1]
    if last.new_tokens < request.new_tokens:
        more = last.new_tokens + PAGE
        longer = Chunk(last.context_tokens, min(more, request.new_tokens))
        assert seconds(cost, [*rest, longer]) > quota_s * (1 - 1e-9)
    elif len(batch.chunks) < len(queue):
        nobody = queue[len(batch.chunks)]
        page = Chunk(nobody.context_tokens, min(PAGE, nobody.new_tokens))
        assert seconds(cost, [*batch.chunks, page]) > quota_s * (1 - 1e-9)


@examples(100)
@given(queues, prices, st.floats(0.005, 1.0), st.sampled_from([64, 512, 8192]))
def test_every_prompt_is_computed_once_in_order_and_nobody_starves(
    queue, cost, quota_s, tokens_max
):
    """One batch after another until nothing waits: each moves on by a page at least."""
    waiting, computed = deque(queue), 0
    total = sum(request.new_tokens for request in queue)
    for _ in range(total // PAGE + len(queue) + 1):
        if not waiting:
            break
        batch = packed(list(waiting), cost, quota_s, tokens_max)
        in_pages = sum(-(-chunk.new_tokens // PAGE) * PAGE for chunk in batch.chunks)
        assert 0 < in_pages <= tokens_max
        computed += sum(chunk.new_tokens for chunk in batch.chunks)
        advance(waiting, batch)
    assert not waiting and computed == total


short = st.builds(
    Chunk,
    context_tokens=st.integers(0, 50).map(lambda pages: pages * PAGE),
    new_tokens=st.integers(1, 3000),
)


@examples(100)
@example([[], [Chunk(0, 1217), Chunk(0, 1729), Chunk(0, 2177), Chunk(0, 2241), Chunk(0, 2945)]])
@given(st.lists(st.lists(short, max_size=12), min_size=2, max_size=8))
def test_ranks_that_pack_alone_finish_together(group):
    """No leader: with enough to do, every rank's batch ends at the same quota."""
    cost, quota_s = PrefillCost(0.0, 0.0, 1e-8), 0.3
    plenty = Chunk(0, 9000)  # 0.4 s alone
    # Room for every queue whole: where tokens_max ends a batch, its rank finishes sooner.
    batches = [packed([*queue, plenty], cost, quota_s, tokens_max=64_000) for queue in group]
    seconds_of = [batch.spent_s for batch in batches]
    assert max(seconds_of) / (sum(seconds_of) / len(seconds_of)) < 1.03


def test_the_paper_s_batch():
    """Two whole requests and the first pages of a third make up 300 ms."""
    cost = PrefillCost(0.0, 0.0, 1e-8)
    queue = [Chunk(32_000, 429), Chunk(0, 2000), Chunk(16_000, 4000), Chunk(0, 100)]
    batch = packed(queue, cost, 0.3)
    assert batch.chunks[:2] == queue[:2]
    assert batch.chunks[2] == Chunk(16_000, 832)
    assert batch.closed and 0.29 < batch.spent_s <= 0.3
