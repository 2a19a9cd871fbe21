"""SGLang's own PrefillAdder under the quota: its loop over the waiting queue, fake memory."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.prefill_cost import PrefillCost
from engine.prefill.cost_fit import CostFit
from engine.prefill.forward_clock import ForwardSample
from engine.prefill.quota_chunking import QuotaChunking
from scheduler.quota import Chunk
from tests.examples import examples

PAGE = 64
COST = PrefillCost(0.0, 0.0, 1e-8)
QUOTA_S = 0.05


class _Request(SimpleNamespace):
    """What the adder reads and writes of SGLang's ``Req``."""

    def __init__(self, name: int, cached: int, new: int) -> None:
        super().__init__(
            rid=str(name),
            full_untruncated_fill_ids=range(cached + new),
            prefix_len=cached,
            host_hit_length=0,
            swa_host_hit_length=0,
            auxiliary_swa_host_hit_length=0,
            mamba_host_hit_length=0,
            extend_end=None,
            output_ids=[],
            last_node=None,
            lock=None,
            retracted_stain=False,
            sampling_params=SimpleNamespace(max_new_tokens=16, ignore_eos=False),
            kv=SimpleNamespace(req_pool_idx=None, holds_mamba=False),
        )

    @property
    def extend_len(self) -> int:
        return self.extend_end - self.prefix_len

    def needs_host_load_back(self) -> bool:
        return False


@pytest.fixture(scope="module")
def adder_class():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_PLATFORM", "dualpath_cpu")
        from engine.sglang.prefill import quota_adder

        class Adder(quota_adder.QuotaPrefillAdder):
            def _replay_len(self, req, prefix_len):
                return 0  # asks for settings that a server publishes at its start

            def _account_prefill_cache_admission(self, req, prefix_len):
                pass

        yield quota_adder, Adder


def make_adder(adder_class, quota, chunk_tokens):
    """Of one scheduler pass, with memory for whatever is added."""
    from sglang.srt.mem_cache.prefill_budget import PrefillBudget

    tree = mock.MagicMock(disable=False, page_size=PAGE)
    tree.supports_mamba.return_value = False
    tree.evictable_size.return_value = 0
    allocator = mock.MagicMock(page_size=PAGE)
    allocator.available_size.return_value = 10**9
    allocator.request_slot_reserve.return_value = 0
    allocator.create_prefill_budget.side_effect = lambda tree, **kw: PrefillBudget(allocator, tree)
    engine = SimpleNamespace(prefill_timing=SimpleNamespace(quota=quota))
    hooks, adder = adder_class
    with (
        mock.patch.object(hooks, "runtime", return_value=engine),
        mock.patch(
            "sglang.srt.managers.schedule_policy.page_interleave_shard_size", return_value=1
        ),
    ):
        return adder(PAGE, tree, allocator, None, 1.0, 16_384, chunk_tokens)


def a_pass(adder, waiting, chunked, align):
    """One scheduler pass (managers/scheduler.py, _get_new_batch_prefill_raw)."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    if chunked is not None:
        chunked = adder.add_chunked_req(chunked)
    for request in waiting:
        if adder.budget_state() == AddReqResult.OTHER:
            break
        if adder.add_one_req(request, chunked is not None, align) != AddReqResult.CONTINUE:
            break
    assert chunked is None or adder.new_chunked_req is None, "SGLang knows one cut request"
    return adder.can_run_list, adder.new_chunked_req or chunked


def run_all(adder_class, requests, chunk_tokens, align=None):
    """Pass after pass; the chunks of every batch."""
    quota = QuotaChunking(CostFit(COST), QUOTA_S, PAGE)
    waiting, chunked, batches = deque(requests), None, []
    while waiting or chunked is not None:
        adder = make_adder(adder_class, quota, chunk_tokens)
        running, chunked = a_pass(adder, waiting, chunked, align)
        assert running, "an empty batch while there is work"
        batches.append([Chunk(request.prefix_len, request.extend_len) for request in running])
        new, context = zip(*((c.new_tokens, c.context_tokens) for c in batches[-1]), strict=True)
        quota.took(ForwardSample(list(new), list(context), 0.1, 0.04))
        for request in running:
            request.prefix_len = request.extend_end
            if request in waiting:
                waiting.remove(request)
    assert quota.batches_total == len(batches), "every batch meets its own forward"
    return batches


def seconds(batch: list[Chunk]) -> float:
    return sum(c.new_tokens * (c.context_tokens + c.new_tokens / 2) * COST.pair_s for c in batch)


@examples(60)
@given(
    st.lists(
        st.tuples(st.integers(0, 100).map(lambda pages: pages * PAGE), st.integers(1, 6000)),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([256, 2048, 8192]),
)
def test_every_batch_keeps_to_the_quota_and_to_sglang_s_chunk_size(
    adder_class, lengths, chunk_tokens
):
    requests = [_Request(i, cached, new) for i, (cached, new) in enumerate(lengths)]
    batches = run_all(adder_class, requests, chunk_tokens)
    assert sum(c.new_tokens for batch in batches for c in batch) == sum(n for _, n in lengths)
    for batch in batches:
        assert sum(c.new_tokens for c in batch) <= chunk_tokens
        only_a_page = len(batch) == 1 and batch[0].new_tokens <= PAGE
        assert seconds(batch) <= QUOTA_S * (1 + 1e-9) or only_a_page
        assert all(sum(c) % PAGE == 0 or sum(c) in map(sum, lengths) for c in batch)


def test_batches_of_long_prompts_are_full(adder_class):
    requests = [_Request(i, 0, 6000) for i in range(4)]
    batches = run_all(adder_class, requests, 8192)
    # A page more of the longest context costs 4 ms of the 50.
    assert all(seconds(batch) > 0.045 for batch in batches[:-1])


def test_chunks_that_must_be_aligned_never_leave_a_batch_empty(adder_class):
    """Some models want cuts at multiples of more than a page."""
    requests = [_Request(i, 90 * PAGE, 1500) for i in range(3)]
    batches = run_all(adder_class, requests, 8192, align=16 * PAGE)
    assert batches[0] == [Chunk(90 * PAGE, 16 * PAGE)]
