"""The fitted time of a prefill forward: right when it can be, never absurd."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.prefill_cost import PrefillCostFit


def seconds_of(cost: tuple[float, float, float], new: int, context: int) -> float:
    base_s, token_s, pair_s = cost
    return base_s + new * token_s + new * (context + new / 2) * pair_s


def test_known_coefficients_are_found_in_noise():
    truth, rng, fit = (0.02, 1e-4, 2e-8), random.Random(1), PrefillCostFit()
    for _ in range(200):
        new, context = rng.randrange(16, 4096), rng.choice([0, 1000, 30_000])
        fit.note([new], [context], seconds_of(truth, new, context) * rng.uniform(0.97, 1.03))
    cost = fit.cost()
    for new, context in ((500, 0), (4000, 0), (430, 32_000)):
        found = seconds_of((cost.base_s, cost.token_s, cost.pair_s), new, context)
        assert found == pytest.approx(seconds_of(truth, new, context), rel=0.1)


def test_it_follows_an_engine_that_becomes_slower():
    fit = PrefillCostFit()
    for speed in (1.0, 3.0):
        for n in range(150):
            new = 200 + 37 * n % 900
            fit.note([new], [0], speed * seconds_of((0.01, 1e-4, 0), new, 0))
    cost = fit.cost()
    found = seconds_of((cost.base_s, cost.token_s, cost.pair_s), 800, 0)
    assert found == pytest.approx(3 * seconds_of((0.01, 1e-4, 0), 800, 0), rel=0.1)


def test_nothing_is_said_of_too_little():
    fit = PrefillCostFit()
    for _ in range(10):
        assert fit.cost() is None
        fit.note([20], [0], 0.01)
    fit.note([100], [0], 0.02)
    assert fit.cost() is not None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 9000), st.integers(0, 60_000), st.floats(0, 10)),
        min_size=3,
        max_size=30,
    )
)
def test_no_term_is_ever_negative(samples):
    fit = PrefillCostFit()
    for new, context, seconds in samples:
        fit.note([new, 256], [context, 0], seconds)
    cost = fit.cost()
    assert min(cost.base_s, cost.token_s, cost.pair_s) >= 0
