"""A decode engine's prefix restore, as SGLang's queues walk through it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from sglang.srt.disaggregation.base import KVPoll

from common.block import BlockKey
from common.board_word import FAILED
from common.messages.from_engines import CancelJob, PullBlocks
from common.messages.from_gateway import ReleasePlan
from engine import plans as plans_module
from engine import runtime
from engine.sglang.decode import restore_hooks
from tests.engine.decode.queues import DecodeParts, Queues
from tests.engine.parts import EARLIER_WEIGHTS, LAYERS, PAGE, Request, keys_of

PROMPT = list(range(100, 118))  # four blocks and two tokens


@pytest.fixture
def make(monkeypatch):
    def make(**settings) -> tuple[DecodeParts, Queues]:
        engine = DecodeParts(**settings)
        monkeypatch.setattr(runtime, "_runtime", engine)
        return engine, Queues(engine)

    return make


@pytest.fixture
def parts(make):
    return make()


# ---- what P is promised ----


@pytest.mark.parametrize(
    ("prompt", "planned", "cached", "promised"),
    [
        (18, 3, 0, 12),
        (18, 4, 0, 16),
        (16, 4, 0, 12),  # at least one token is P's
        (17, 4, 0, 16),
        (18, 4, 8, 16),
        (18, 3, 12, 12),  # the engine's own cache has as much
        (18, 2, 12, 12),  # or more
        (18, 4, 6, 6),  # and ends inside a block
        (18, 0, 4, 4),
        (3, 0, 0, 0),
    ],
)
def test_p_is_promised_the_longer_of_plan_and_cache(parts, prompt, planned, cached, promised):
    engine, queues = parts
    request = Request("r", PROMPT[:prompt])
    engine.plan(request, planned)
    match = queues.match(request, cached)
    assert match.decode_prefix_len == promised
    assert match.l1_prefix_len == cached


def test_without_a_plan_nothing_is_promised_beyond_the_cache(parts):
    engine, queues = parts
    waiting = queues.admit(Request("r", PROMPT), cached_tokens=8)
    assert waiting.prefix_match.decode_prefix_len == 8
    assert engine.links.sent == [] and queues.polls() == [KVPoll.Success]


@pytest.mark.parametrize("foreign_from", [0, 2, 3])
def test_a_plan_with_blocks_of_another_prompt_is_ignored(parts, foreign_from, caplog):
    engine, queues = parts
    request = Request("r", PROMPT)
    keys = keys_of(request, engine.weights.digest)
    keys[foreign_from:] = [BlockKey(bytes([i]) * 32) for i in range(len(keys) - foreign_from)]
    engine.plan(request, 4, keys=keys)
    assert queues.match(request, 0).decode_prefix_len == 0
    assert "plan of another prompt" in caplog.text


@pytest.mark.parametrize("other", [{"cache_salt": "tenant"}, {"extra_key": "lora"}])
def test_a_plan_of_another_tenant_is_ignored(parts, other):
    engine, queues = parts
    engine.plan(Request("r", PROMPT), 4)
    assert queues.match(Request("r", PROMPT, **other), 0).decode_prefix_len == 0
    engine.plan(Request("r", PROMPT, **other), 4)
    assert queues.match(Request("r", PROMPT, **other), 0).decode_prefix_len == 16


def test_a_plan_of_other_weights_is_ignored(parts):
    engine, queues = parts
    request = Request("r", PROMPT)
    engine.plan(request, 4, namespace_digest=EARLIER_WEIGHTS)
    assert queues.match(request, 0).decode_prefix_len == 0
    engine.plan(request, 4)
    assert queues.match(request, 0).decode_prefix_len == 16
    engine.weights.changed("2", is_clean=True)
    assert queues.match(request, 0).decode_prefix_len == 0


def test_with_a_layer_window_at_p_no_more_is_matched_than_is_planned(make):
    engine, queues = make(promise_planned_only=True)
    request = Request("r", PROMPT)
    queues.match(request, 0)
    assert queues.matched_prompt == PROMPT[:1]  # SGLang leaves one token to P in any case
    engine.plan(request, 2)
    assert queues.match(request, 4).decode_prefix_len == 8
    assert queues.matched_prompt == PROMPT[:9]
    assert request.origin_input_ids == PROMPT


def test_the_prompt_is_whole_again_also_after_a_match_that_raised(make):
    _, queues = make(promise_planned_only=True)
    request = Request("r", PROMPT)

    def original(queue, req):
        raise RuntimeError("a bug of SGLang's")

    with pytest.raises(RuntimeError):
        restore_hooks.around_match(original, queues, request)
    assert request.origin_input_ids == PROMPT


def test_without_a_window_the_whole_prompt_is_matched(parts):
    _, queues = parts
    queues.match(Request("r", PROMPT), 0)
    assert queues.matched_prompt == PROMPT


def test_a_prompt_is_hashed_once(parts, monkeypatch):
    engine, queues = parts
    hashed = Mock(wraps=plans_module.page_hashes)
    monkeypatch.setattr(plans_module, "page_hashes", hashed)
    request = Request("r", PROMPT)
    engine.plan(request, 3)
    for _ in range(5):  # SGLang asks again as long as there is no room
        queues.match(request, 0)
    queues.commit(queues.admit(request))
    assert hashed.call_count == 1


# ---- pages and deliveries ----


def test_each_reader_is_asked_for_its_blocks_into_the_gaps_pages(parts):
    engine, queues = parts
    request = Request("r", PROMPT)
    plan = engine.plan(request, 4, readers=("a", "b"))
    queues.admit(request, cached_tokens=4)
    gap = engine.rows[0, 4:16]
    assert gap.reshape(-1, PAGE)[:, 0].tolist() == [4, 8, 12]  # pages 1, 2, 3
    assert torch.equal(gap, torch.arange(4, 16))
    # Of blocks 1, 2 and 3: the second reader has 1 and 3.
    asked = {agent: (job.keys, job.pages) for agent, job in engine.jobs_sent()}
    assert asked == {
        "b": ([plan.keys[1], plan.keys[3]], [1, 3]),
        "a": ([plan.keys[2]], [2]),
    }
    assert all(job.plan == plan.id and not job.urgent for _, job in engine.jobs_sent())
    assert sorted(engine.holds.held_pages()) == [1, 2, 3]


def test_restored_pages_are_the_requests_own_and_not_the_trees(parts):
    engine, queues = parts
    request = Request("r", PROMPT)
    engine.plan(request, 4)
    queues.admit(request, cached_tokens=8)
    assert request.kv.cache_protected_len == 8


def test_a_request_without_a_restore_keeps_what_the_tree_protects(parts):
    engine, queues = parts
    request = Request("r", PROMPT)
    engine.plan(request, 2)
    queues.admit(request, cached_tokens=8)
    assert request.kv.cache_protected_len == 8 and engine.deliveries.started_total == 0
    assert len(engine.allocator.free_pages) == 64


def test_no_pages_for_a_promise_is_an_error_and_not_a_wrong_token(make):
    engine, queues = make(pages=2)
    request = Request("r", PROMPT)
    engine.plan(request, 4)
    with pytest.raises(RuntimeError, match="16 tokens"):
        queues.admit(request)


def test_what_p_sends_through_staging_lands_behind_the_promised_prefix(parts):
    engine, queues = parts
    handler = SimpleNamespace(kv_buffer_info={"page_size": PAGE})
    seen = []

    def original(handler, staging_offset, page_start, num_pages, decode_req, receiver):
        # SGLang's: tokens from the protected prefix on.
        seen.append(decode_req.req.kv.cache_protected_len + page_start * PAGE)

    request = Request("r", PROMPT)
    engine.plan(request, 3)
    restored = queues.admit(request, cached_tokens=4)
    plain = queues.admit(Request("s", PROMPT), cached_tokens=8)
    for waiting in (restored, plain):
        for page_start in (0, 1):
            restore_hooks.around_scatter(original, handler, 0, page_start, 1, waiting, None)
    assert seen == [12, 16, 8, 12]


def test_pages_under_a_transfer_are_not_counted_on(parts):
    engine, queues = parts
    assert restore_hooks.less_unevictable(100, queues) == 100
    request = Request("r", PROMPT)
    engine.plan(request, 3)
    queues.admit(request)
    assert restore_hooks.less_unevictable(100, queues) == 100 - 3 * PAGE
    ((_, job),) = engine.jobs_sent()
    engine.jobs.over(job.job)
    assert restore_hooks.less_unevictable(100, queues) == 100


# ---- when it may decode ----


def test_a_request_decodes_when_both_parts_are_whole(parts):
    engine, queues = parts
    request = Request("r", PROMPT)
    engine.plan(request, 4, readers=("a", "b"))
    waiting = queues.admit(request)
    queues.admit(Request("s", PROMPT))
    (_, first), (_, second) = engine.jobs_sent()
    assert queues.polls() == [KVPoll.Transferring, KVPoll.Success]
    engine.write(first, LAYERS)
    engine.write(second, LAYERS - 1)
    assert queues.polls()[0] == KVPoll.Transferring
    waiting.kv_receiver.now = KVPoll.WaitingForInput
    assert queues.polls()[0] == KVPoll.WaitingForInput
    engine.write(second, LAYERS)
    assert queues.polls()[0] == KVPoll.WaitingForInput
    waiting.kv_receiver.now = KVPoll.Success
    assert queues.polls() == [KVPoll.Success, KVPoll.Success]


def test_a_failed_delivery_fails_its_request_alone(parts):
    engine, queues = parts
    for rid in ("r", "s"):
        request = Request(rid, PROMPT)
        engine.plan(request, 4)
        queues.admit(request)
    (_, first), (_, second) = engine.jobs_sent()
    engine.write(first, FAILED)
    engine.write(second, LAYERS)
    queues.queue[0].kv_receiver.now = KVPoll.Transferring
    assert queues.polls() == [KVPoll.Failed, KVPoll.Success]


def test_what_p_could_not_send_fails_whatever_was_delivered(parts):
    engine, queues = parts
    request = Request("r", PROMPT)
    engine.plan(request, 4)
    waiting = queues.admit(request)
    engine.write(engine.jobs_sent()[0][1], LAYERS)
    waiting.kv_receiver.now = KVPoll.Failed
    assert queues.polls() == [KVPoll.Failed]


def test_an_agent_that_is_away_fails_the_request(parts):
    engine, queues = parts
    request = Request("r", PROMPT)
    engine.plan(request, 4)
    engine.links.reachable = False
    queues.admit(request)
    assert queues.polls() == [KVPoll.Failed]


def test_a_delivery_that_comes_too_late_stays_failed(make):
    engine, queues = make(deliver_timeout_s=0.01)
    request = Request("r", PROMPT)
    engine.plan(request, 4)
    queues.admit(request)
    time.sleep(0.02)
    assert queues.polls() == [KVPoll.Failed]
    engine.write(engine.jobs_sent()[0][1], LAYERS)
    assert queues.polls() == [KVPoll.Failed]


# ---- the end ----


def test_at_the_commit_new_blocks_are_offered_and_then_the_readers_let_go(parts):
    engine, queues = parts
    request = Request("r", PROMPT)
    plan = engine.plan(request, 3, readers=("a", "b"))
    waiting = queues.admit(request)
    for _, job in engine.jobs_sent():
        engine.write(job, LAYERS)
        engine.jobs.over(job.job)
    engine.links.sent.clear()
    queues.commit(waiting)
    assert engine.links.of(PullBlocks) == []  # SGLang may still find that it is not what P sent
    queues.join_batch(request)
    (*releases, offer) = engine.links.sent
    assert offer[0] == "own" and isinstance(offer[1], PullBlocks)
    assert offer[1].keys == keys_of(request, engine.weights.digest)[3:]
    assert offer[1].parent == plan.keys[-1]
    assert releases == [("a", ReleasePlan(plan.id)), ("b", ReleasePlan(plan.id))]
    assert engine.plans.get("r") is None


def test_a_request_with_unsound_metadata_is_not_stored_but_released(parts):
    engine, queues = parts
    request = Request("r", PROMPT)
    plan = engine.plan(request, 3)
    waiting = queues.admit(request)
    queues.commit(waiting, is_sound=False)
    queues.join_batch(request)
    assert engine.links.of(PullBlocks) == []
    assert engine.links.of(ReleasePlan) == [("a", ReleasePlan(plan.id))]


def test_a_request_without_a_plan_is_stored_and_releases_nothing(parts):
    engine, queues = parts
    request = Request("r", PROMPT)
    queues.commit(queues.admit(request))
    queues.join_batch(request)
    ((_, offer),) = engine.links.sent
    assert offer.keys == keys_of(request, engine.weights.digest)


def test_after_a_weight_update_under_way_nothing_is_stored(parts):
    engine, queues = parts
    request = Request("r", PROMPT)
    plan = engine.plan(request, 3)
    waiting = queues.admit(request)
    engine.weights.changed("2", is_clean=True)
    queues.commit(waiting)
    assert engine.links.of(PullBlocks) == []
    assert engine.links.of(ReleasePlan) == [("a", ReleasePlan(plan.id))]


def test_an_aborted_request_stops_its_writers_and_holds_its_pages_until_they_have(parts):
    engine, queues = parts
    request = Request("r", PROMPT)
    plan = engine.plan(request, 4, readers=("a", "b"))
    waiting = queues.admit(request)
    jobs = engine.jobs_sent()
    engine.links.sent.clear()
    restore_hooks.before_release(queues, waiting)
    assert engine.links.of(CancelJob) == [(agent, CancelJob(job.job)) for agent, job in jobs]
    assert engine.links.of(ReleasePlan) == [(a, ReleasePlan(plan.id)) for a in ("a", "b")]
    assert engine.deliveries.failed_total == 0
    assert engine.plans.get("r") is None
    assert engine.holds.unevictable_tokens == 4 * PAGE
    for _, job in jobs:
        engine.jobs.over(job.job, "cancelled")
    assert engine.holds.unevictable_tokens == 0


def test_a_failed_restore_is_counted_once_and_says_why(parts, caplog):
    engine, queues = parts
    request = Request("r", PROMPT)
    engine.plan(request, 4)
    waiting = queues.admit(request)
    engine.write(engine.jobs_sent()[0][1], FAILED)
    queues.polls()
    queues.polls()
    restore_hooks.before_release(queues, waiting)
    assert engine.deliveries.failed_total == 1
    assert "agent a could not deliver" in caplog.text


def test_a_request_that_was_promised_nothing_is_released_quietly(parts):
    engine, queues = parts
    waiting = queues.admit(Request("r", PROMPT))
    restore_hooks.before_release(queues, waiting)
    waiting.prefix_match = None  # without a radix cache SGLang matches nothing
    restore_hooks.before_release(queues, waiting)
    assert engine.links.sent == []


def test_a_restore_that_no_completion_word_is_left_for_is_counted_once(parts):
    engine, queues = parts
    for _ in range(8):
        engine.board.take()
    request = Request("r", PROMPT)
    engine.plan(request, 4)
    waiting = queues.admit(request)
    assert queues.polls() == [KVPoll.Failed]
    restore_hooks.before_release(queues, waiting)
    assert engine.deliveries.failed_total == 1
