"""What a chunk of a prompt costs: the pairs that its tokens have in each kind of layer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.prefill_cost import TERMS, PrefillCost, request_terms
from tests.examples import examples

WINDOW_PAIRS = TERMS.index("window_pair_s") - 1
PAIRS = TERMS.index("pair_s") - 1
lengths = st.integers(0, 3000)


@examples(200)
@given(lengths, st.integers(1, 3000), st.integers(0, 4096))
def test_a_token_has_as_many_pairs_as_its_window_is_long_and_fewer_at_the_beginning(
    context, new, window
):
    terms = request_terms(context, new, window)
    counted = sum(min(position, window) for position in range(context, context + new))
    assert terms[WINDOW_PAIRS] == pytest.approx(counted, abs=new / 2 + 1)
    assert terms[WINDOW_PAIRS] <= terms[PAIRS] * (1 + 1e-12)


@examples(200)
@given(lengths, st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([0, 128, 5000]))
def test_pairs_of_chunks_are_those_of_the_prompt(context, first, second, window):
    kinds = [WINDOW_PAIRS, PAIRS]
    whole = request_terms(context, first + second, window)[kinds]
    chunks = request_terms(context, first, window) + request_terms(context + first, second, window)
    assert chunks[kinds] == pytest.approx(whole)


@examples(100)
@given(lengths, lengths, st.integers(0, 1000), st.sampled_from([0, 128, 5000]))
def test_no_term_falls_with_a_longer_chunk(context, new, more, window):
    shorter, longer = (request_terms(context, n, window) for n in (new, new + more))
    assert (longer >= shorter * (1 - 1e-12)).all()


def test_a_long_prompt_of_a_model_with_few_layers_that_attend_to_all():
    """Of 64 Ki tokens, with a quarter of the layers in question: recurrent ones and those with a
    window leave a quarter of the quadratic term."""
    tokens = 65_536
    plain = PrefillCost(0.0, 0.0, 4e-9).batch_s([0], [tokens])
    recurrent = PrefillCost(0.0, 3e-7, 1e-9).batch_s([0], [tokens])
    windowed = PrefillCost(0.0, 0.0, 1e-9, window_pair_s=3e-9, window_tokens=128)
    linear_s = 3e-7 * tokens
    assert recurrent == pytest.approx(plain / 4 + linear_s)
    assert windowed.batch_s([0], [tokens]) == pytest.approx(plain / 4, rel=0.02)
    assert np.diff([windowed.batch_s([c], [64]) for c in (0, 64, 128)])[1] > 0
