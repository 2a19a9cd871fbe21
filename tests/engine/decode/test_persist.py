"""What a decode engine offers to its agent: all full blocks that the store does not have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.block import BlockKey, block_keys
from common.ids import Incarnation, PlanId
from common.page_hashes import page_hashes
from engine.config import EngineConfig
from engine.decode.persist import Persister
from engine.plans import HeldPlan
from engine.transfers.jobs import Jobs

PAGE = 4
PROMPT = list(range(18))
WEIGHTS, EARLIER_WEIGHTS = b"n" * 32, b"e" * 32


class Links:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.offered: list[BlockKey] = []

    def incarnation(self, agent):
        return 1

    def send(self, agent, message):
        self.offered += message.keys
        return True


@pytest.fixture
def links():
    return Links()


@pytest.fixture
def persister(links):
    config = EngineConfig(name="d0", role="decode", agent="agent-d0", agents={}, controls=[])
    holds: Any = SimpleNamespace(hold=lambda job, pages: None, release=lambda job: None)
    jobs = Jobs(Incarnation(1), holds, tell=lambda job, reason: None)
    rows = torch.arange(64).reshape(1, 64)
    return Persister(config, PAGE, rows, jobs, links, lambda: WEIGHTS)


def keys(tokens: list[int], weights: bytes = WEIGHTS) -> list[BlockKey]:
    return block_keys(weights, page_hashes(tokens[: len(tokens) // PAGE * PAGE], PAGE, None, None))


def plan(planned: list[BlockKey], weights: bytes = WEIGHTS) -> HeldPlan:
    return HeldPlan(PlanId(1), "rid", weights, planned, ["agent-d0"], [0] * len(planned), 1e9)


def begin(persister: Persister, held: HeldPlan | None) -> None:
    kv = SimpleNamespace(req_pool_idx=0)
    req = SimpleNamespace(rid="rid", origin_input_ids=PROMPT, output_ids=[], kv=kv)
    req.extra_key = req.cache_salt = None
    persister.begin(req, held)


def test_blocks_from_the_store_are_not_offered_again(persister, links):
    begin(persister, plan(keys(PROMPT)[:3]))
    assert links.offered == keys(PROMPT)[3:]


def test_without_a_plan_every_block_is_offered(persister, links):
    begin(persister, None)
    assert links.offered == keys(PROMPT)


def test_a_plan_of_another_prompt_does_not_stand_for_this_one(persister, links):
    begin(persister, plan(keys(PROMPT[1:])[:3]))
    assert links.offered == keys(PROMPT)


def test_nothing_is_stored_of_a_prompt_that_was_planned_under_other_weights(persister, links):
    begin(persister, plan(keys(PROMPT, EARLIER_WEIGHTS)[:3], EARLIER_WEIGHTS))
    assert links.offered == []
