"""What a decode engine offers of windows: those that the next token attends to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.block import block_keys
from common.ids import Incarnation
from common.messages.from_agents import PullEnded
from common.messages.from_engines import PullBlocks
from common.page_hashes import page_hashes
from engine import runtime
from engine.sglang.decode import persist_hooks
from tests.engine.parts import PAGE, WITH_WINDOWS, Parts, Request

PROMPT = list(range(18))
WINDOW_PAGE = {block: 40 + block for block in range(9)}


@pytest.fixture
def engine(monkeypatch) -> Parts:
    engine = Parts("decode", namespace=WITH_WINDOWS)
    monkeypatch.setattr(runtime, "_runtime", engine)
    engine.rows[0] = torch.arange(10 * PAGE, 10 * PAGE + engine.rows.shape[1])
    return engine


def keep(engine: Parts, *blocks: int) -> None:
    """SGLang has the windows of these blocks of the request, and no others."""
    assert engine.window is not None
    engine.window.rows.zero_()
    for block in blocks:
        page, rows = WINDOW_PAGE[block], torch.arange(PAGE)
        engine.window.rows[(10 + block) * PAGE + rows] = page * PAGE + rows


def begin(engine: Parts, request: Any) -> None:
    engine.persister.begin(request)
    engine.persister.advance(request, len(request.origin_input_ids))


def offers(engine: Parts) -> list[PullBlocks]:
    return [message for _, message in engine.links.of(PullBlocks)]


def windows(engine: Parts) -> list[tuple[int, int]]:
    """(block, page) of all that was offered."""
    keys = block_keys(engine.weights.digest, page_hashes(list(range(60)), PAGE, None, None))
    return [
        (keys.index(key), place)
        for offer in offers(engine)
        for part in offer.parts
        for key, place in zip(part.keys, part.places, strict=True)
    ]


def test_of_a_prompt_the_windows_of_its_last_pages_go_with_its_blocks(engine):
    keep(engine, 2, 3, 4)
    begin(engine, Request("rid", PROMPT))
    assert len(offers(engine)[0].keys) == 4
    assert windows(engine) == [(2, WINDOW_PAGE[2]), (3, WINDOW_PAGE[3])]


@pytest.mark.parametrize("tokens", range(4 * PAGE, 5 * PAGE))
def test_a_page_that_the_next_token_does_not_attend_to_is_not_offered(engine, tokens):
    """SGLang may have memory for it that P has written nothing into."""
    keep(engine, *range(6))
    begin(engine, Request("rid", list(range(tokens))))
    first = (tokens - (2 * PAGE - 1)) // PAGE
    assert [block for block, _ in windows(engine)] == list(range(first, 4))


def test_a_window_that_is_gone_is_not_offered_and_its_block_is(engine):
    keep(engine, 3)
    begin(engine, Request("rid", PROMPT))
    assert len(offers(engine)[0].keys) == 4
    assert [block for block, _ in windows(engine)] == [3]


def test_while_it_decodes_each_block_goes_with_its_window(engine):
    request = Request("rid", list(PROMPT))
    keep(engine, 2, 3, 4)
    begin(engine, request)
    for token in range(18, 18 + 7):
        keep(engine, *range(token // PAGE - 1, token // PAGE + 2))
        request.output_ids.append(token)
        persist_hooks.after_batch_result(None, None, SimpleNamespace(reqs=[request]))
    assert [block for block, _ in windows(engine)] == [2, 3, 4, 5]
    assert [len(offer.keys) for offer in offers(engine)] == [4, 1, 1]


def test_pages_of_both_pools_are_held_until_the_pull_has_ended(engine):
    keep(engine, 2, 3, 4)
    begin(engine, Request("rid", PROMPT))
    (job,) = (offer.job for offer in offers(engine))
    of_windows = engine.holds.parts[0]
    assert sorted(engine.holds.held_pages()) == [10, 11, 12, 13]
    assert sorted(of_windows.held_pages()) == [WINDOW_PAGE[2], WINDOW_PAGE[3]]
    engine.persister.pull_ended(PullEnded(Incarnation(5), job, [True] * 6))
    engine.jobs.over(job)
    assert not engine.holds.held_pages() and not of_windows.held_pages()
