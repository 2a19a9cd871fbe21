"""A grammar that allows no token fails its own request, not the engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch

from engine.sglang.sampling_hooks import after_grammar

NO = -torch.inf


def drawn(logits: torch.Tensor) -> list[int]:
    rows = len(logits)
    top_ks, ones = torch.full((rows,), 3), torch.ones(rows)
    return top_k_top_p_min_p_sampling_from_probs_torch(
        logits.softmax(-1), top_ks, ones, torch.zeros(rows), False, None, torch.zeros(rows)
    ).tolist()


def test_a_token_is_drawn_where_none_is_allowed():
    logits = torch.tensor([[1.0, NO, NO, NO], [NO, NO, NO, NO], [5.0, 6.0, 7.0, 8.0]])
    with pytest.raises(RuntimeError, match="probability tensor"):
        drawn(logits)
    before = logits.clone()
    after_grammar(None, SimpleNamespace(grammar_mask=None), logits)
    assert torch.equal(logits, before)
    after_grammar(None, SimpleNamespace(grammar_mask=object()), logits)
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    assert drawn(logits)[0] == 0


def test_what_is_no_number_stays_to_be_seen():
    """As of KV that was never computed: no grammar's doing."""
    logits = torch.tensor([[torch.nan, 1.0], [NO, NO]])
    after_grammar(None, SimpleNamespace(grammar_mask=object()), logits)
    assert logits[0].isnan().any() and logits[1].tolist() == [0.0, 0.0]
