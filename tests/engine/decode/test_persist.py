"""What a decode engine offers to its agent: all full blocks that the store does not have, once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.block import NO_PARENT, BlockKey, block_keys, tenant_digest
from common.experiment import Experiment
from common.ids import Incarnation
from common.messages.from_agents import PullEnded
from common.messages.from_engines import PullBlocks
from common.page_hashes import page_hashes
from engine import runtime
from engine.decode import persist
from engine.sglang.decode import persist_hooks
from engine.weights import FolderDigested
from tests.engine.parts import (
    EARLIER_WEIGHTS,
    NAMESPACE,
    PAGE,
    UNDER_A_DRAFT,
    Parts,
    Request,
    keys_of,
)
from tests.examples import examples

ZERO_IO = Experiment(zero_io=True)
PROMPT = list(range(18))
OUTPUT = list(range(500, 540))


@pytest.fixture
def engine(monkeypatch) -> Parts:
    engine = Parts("decode")
    monkeypatch.setattr(runtime, "_runtime", engine)
    # Position p of the request's row is row 10 * PAGE + p: its pages are 10, 11 and so on.
    engine.rows[0] = torch.arange(10 * PAGE, 10 * PAGE + engine.rows.shape[1])
    return engine


def request_of(prompt: list[int] = PROMPT, **other: str) -> Any:
    return Request("rid", list(prompt), **other)


def offers(engine: Parts) -> list[PullBlocks]:
    return [message for _, message in engine.links.of(PullBlocks)]


def offered(engine: Parts) -> list[BlockKey]:
    return [key for offer in offers(engine) for key in offer.keys]


def keys(tokens: list[int], engine: Parts) -> list[BlockKey]:
    hashes = page_hashes(tokens[: len(tokens) // PAGE * PAGE], PAGE, None, None)
    return block_keys(engine.weights.digest, hashes)


def decode_steps(engine: Parts, request: Any, tokens: list[int]) -> None:
    """SGLang's decode batches: each adds a token, whose KV the next one computes."""
    for token in tokens:
        request.output_ids.append(token)
        persist_hooks.after_batch_result(None, None, SimpleNamespace(reqs=[request]))


def begin(engine: Parts, request: Any) -> None:
    """The prompt's KV has come, and SGLang puts the request into a batch."""
    engine.persister.begin(request)
    engine.persister.advance(request, len(request.origin_input_ids))


# ---- the prompt ----


def test_blocks_from_the_store_are_not_offered_again(engine):
    request = request_of()
    engine.plan(request, 3)
    begin(engine, request)
    assert offered(engine) == keys(PROMPT, engine)[3:]


def test_what_the_plan_has_found_is_known_to_the_end_of_the_answer(engine):
    """For snapshots, which stand for those of these blocks; the plan is gone by then."""
    request = request_of()
    engine.plan(request, 3)
    begin(engine, request)
    engine.plans.drop(request.rid)
    decode_steps(engine, request, OUTPUT[:PAGE])
    found = [engine.persister.found_before(request, blocks * PAGE) for blocks in (5, 3, 1)]
    assert found == [keys(PROMPT, engine)[:3], keys(PROMPT, engine)[:2], []]
    engine.persister.end(request)
    assert engine.persister.found_before(request, 5 * PAGE) == []


def test_of_a_model_with_more_state_than_blocks_nothing_is_offered(engine):
    persister = persist.Persister(
        engine.config, engine.table, engine.jobs, engine.links, engine.plans, is_on=False
    )
    request = request_of()
    persister.begin(request)
    persister.advance(request, len(PROMPT))
    assert offers(engine) == []


def test_without_a_plan_every_block_is_offered(engine):
    begin(engine, request_of())
    assert offered(engine) == keys(PROMPT, engine)
    assert offers(engine)[0].parent == NO_PARENT


@pytest.mark.parametrize("planned", [0, 3])
def test_under_a_draft_a_block_goes_out_when_the_token_behind_it_is_known(monkeypatch, planned):
    """Keys are over bigrams: the draft's KV of a token depends on the next one."""
    engine = Parts("decode", namespace=UNDER_A_DRAFT)
    monkeypatch.setattr(runtime, "_runtime", engine)
    prompt = list(range(4 * PAGE))
    request = request_of(prompt)
    engine.plan(request, planned)
    begin(engine, request)
    assert len(offered(engine)) == 3 - planned
    decode_steps(engine, request, [500])
    hashes = page_hashes([*prompt, 500], PAGE, bigrams=True)
    assert len(hashes) == 4
    assert offered(engine) == block_keys(engine.weights.digest, hashes)[planned:]


def test_a_plan_of_another_prompt_does_not_stand_for_this_one(engine):
    request = request_of()
    engine.plan(request, 3, keys=keys(PROMPT[1:], engine)[:3])
    begin(engine, request)
    assert offered(engine) == keys(PROMPT, engine)


def test_nothing_is_stored_of_a_prompt_that_was_planned_under_other_weights(engine):
    request = request_of()
    engine.plan(request, 3, namespace_digest=EARLIER_WEIGHTS)
    begin(engine, request)
    decode_steps(engine, request, OUTPUT)
    assert offered(engine) == []


def test_nothing_is_stored_of_a_prompt_whose_blocks_nobody_delivered(engine):
    request = request_of()
    plan = engine.plan(request, 3)
    engine.plans.put(msgspec.structs.replace(plan, experiment=ZERO_IO))
    begin(engine, request)
    decode_steps(engine, request, OUTPUT)
    assert offered(engine) == []
    # A plan without a hit is computed as ever: a benchmark fills its store so.
    engine.plans.put(msgspec.structs.replace(plan, keys=[], reader=[], experiment=ZERO_IO))
    begin(engine, request)
    assert offered(engine) != []


def test_nothing_is_stored_of_a_request_that_asks_for_it(engine):
    request = request_of()
    engine.plans.put(msgspec.structs.replace(engine.plan(request, 0), no_store=True))
    begin(engine, request)
    decode_steps(engine, request, OUTPUT)
    assert offered(engine) == []


def test_an_engine_of_a_measurement_without_io_stores_nothing():
    engine = Parts("decode", experiment=ZERO_IO)
    begin(engine, request_of())
    assert offered(engine) == []


def test_a_tenants_blocks_have_its_keys_and_its_digest(engine):
    request = request_of(cache_salt="alice")
    begin(engine, request)
    assert offered(engine) == keys_of(request, engine.weights.digest)
    assert set(offered(engine)).isdisjoint(keys(PROMPT, engine))
    assert offers(engine)[0].tenant == tenant_digest("alice")


# ---- while it decodes ----


def test_blocks_are_offered_when_they_are_full_once_and_in_order(engine):
    request = request_of()
    engine.plan(request, 2)
    begin(engine, request)
    # 18 tokens of prompt: the fifth block is full with the second token of output, whose own
    # KV comes with the third.
    decode_steps(engine, request, OUTPUT[:2])
    assert len(offered(engine)) == 2
    decode_steps(engine, request, OUTPUT[2:3])
    assert len(offered(engine)) == 3
    decode_steps(engine, request, OUTPUT[3:])
    everything = keys(PROMPT + OUTPUT[:-1], engine)
    assert offered(engine) == everything[2:]
    pages = [page for offer in offers(engine) for page in offer.pages]
    assert pages == [10 + block for block in range(2, len(everything))]
    for offer in offers(engine):
        assert offer.parent == everything[everything.index(offer.keys[0]) - 1]


@examples(60)
@given(
    prompt=st.integers(1, 40),
    output=st.integers(0, 60),
    planned=st.integers(0, 10),
    steps=st.lists(st.integers(1, 30), max_size=8),
)
def test_however_tokens_come_each_block_is_offered_once(prompt, output, planned, steps):
    engine = Parts("decode")
    tokens = list(range(7, 7 + prompt + output))
    request = request_of(tokens[:prompt])
    engine.plan(request, planned)
    begin(engine, request)
    request.output_ids = tokens[prompt:]
    done = prompt
    for step in (*steps, len(tokens)):
        done = min(len(tokens), done + step)
        engine.persister.advance(request, done)
    everything = keys(tokens, engine)
    assert offered(engine) == everything[min(planned, prompt // PAGE) :]


def test_the_last_blocks_are_offered_before_the_request_loses_its_pages(engine):
    request = request_of()
    begin(engine, request)
    request.output_ids = OUTPUT[:7]
    request.finished_reason = "length"
    persist_hooks.after_batch_result(None, None, SimpleNamespace(reqs=[request]))
    assert len(offered(engine)) == 4  # a finished request's pages may be others' already
    persist_hooks.before_checkpoint(None, request, up_to=24)
    assert offered(engine) == keys(PROMPT + OUTPUT[:6], engine)
    persist_hooks.before_checkpoint(None, request, up_to=25)
    engine.persister.advance(request, 24)
    assert len(offered(engine)) == 6


def test_what_the_batch_in_flight_is_about_to_compute_is_not_offered(engine):
    """With overlap SGLang has committed one more token when a request ends: here the last of a
    block."""
    request = request_of()
    begin(engine, request)
    request.output_ids = OUTPUT[:6]
    request.finished_reason = "length"
    persist_hooks.before_checkpoint(None, request, up_to=24)
    assert offered(engine) == keys(PROMPT + OUTPUT[:5], engine) != keys(PROMPT + OUTPUT[:6], engine)


def test_a_request_that_goes_on_after_a_checkpoint_is_still_followed(engine):
    request = request_of()
    begin(engine, request)
    persist_hooks.before_checkpoint(None, request, up_to=18)
    decode_steps(engine, request, OUTPUT[:3])
    assert offered(engine) == keys(PROMPT + OUTPUT[:2], engine)


def test_nothing_is_offered_after_a_weight_update_nor_when_it_is_taken_back(engine):
    request = request_of()
    begin(engine, request)
    before = offered(engine)
    engine.weights.changed("2", is_clean=True)
    decode_steps(engine, request, OUTPUT[:8])
    engine.weights.changed("1", is_clean=True)
    engine.weights.heard(FolderDigested(2, NAMESPACE.model_digest))
    assert engine.weights.namespace == NAMESPACE
    decode_steps(engine, request, OUTPUT[8:])
    persist_hooks.before_checkpoint(None, request, up_to=40)
    assert offered(engine) == before == keys(PROMPT, engine)


def test_a_request_that_never_began_is_not_offered(engine):
    decode_steps(engine, request_of(), OUTPUT)
    assert engine.links.sent == []


# ---- pulls ----


def test_with_too_many_pulls_open_blocks_are_offered_later(engine, monkeypatch):
    monkeypatch.setattr(persist, "PULLS_OPEN_MAX", 1)
    request = request_of(list(range(100, 108)))
    begin(engine, request)
    (first,) = offers(engine)
    decode_steps(engine, request, OUTPUT[:9])
    assert len(offers(engine)) == 1 and engine.persister.deferred_offers_total > 0
    engine.persister.pull_ended(PullEnded(Incarnation(5), first.job, [True, False]))
    engine.jobs.over(first.job)
    decode_steps(engine, request, OUTPUT[9:10])
    assert offered(engine) == keys(request.origin_input_ids + OUTPUT[:9], engine)
    assert engine.persister.stored_blocks_total == 1


def test_a_long_prompt_is_offered_in_parts(engine, monkeypatch):
    monkeypatch.setattr(persist, "PULL_BLOCKS_MAX", 3)
    begin(engine, request_of())
    assert [len(offer.keys) for offer in offers(engine)] == [3, 1]
    assert offered(engine) == keys(PROMPT, engine)
    assert offers(engine)[1].parent == keys(PROMPT, engine)[2]


def test_pages_are_held_until_the_pull_has_ended(engine):
    begin(engine, request_of())
    assert sorted(engine.holds.held_pages()) == [10, 11, 12, 13]
    (offer,) = offers(engine)
    engine.jobs.over(offer.job)
    assert engine.holds.held_pages() == []


def test_an_agent_that_is_away_costs_the_blocks_and_nothing_else(engine):
    engine.links.reachable = False
    begin(engine, request_of())
    assert engine.persister.offered_blocks_total == 0
    assert len(engine.jobs) == 0 and engine.holds.held_pages() == []


def test_requests_are_bounded_and_the_oldest_is_given_up(engine, monkeypatch):
    monkeypatch.setattr(persist, "REQUESTS_MAX", 1)
    first, second = Request("r", PROMPT[:3]), Request("s", PROMPT[:3])
    for request in (first, second):
        begin(engine, request)
        request.output_ids = OUTPUT[:5]
    for request in (first, second):
        engine.persister.advance(request, 8)
    assert len(offered(engine)) == 2  # of the second one
