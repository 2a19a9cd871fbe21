"""The fitted time of a prefill forward: right when it can be, never absurd."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.prefill_cost import PrefillCost
from engine.prefill.cost_fit import CostFit, relative
from tests.examples import examples

TRUTH = PrefillCost(0.02, 1e-4, 2e-8)
CPU_LIKE = PrefillCost(0.002, 1e-5, 4e-8, request_s=1e-3, prefix_pair_s=6e-8, own_pair_s=1.6e-7)
"""Attention with a cached prefix takes another route, which skips no pairs."""


def seconds_of(cost: PrefillCost, *chunks: tuple[int, int]) -> float:
    """Of a batch of (new, context)."""
    new, context = (np.array(column, float) for column in zip(*chunks, strict=True))
    return cost.batch_s(context, new)


def note(fit: CostFit, seconds: float, *chunks: tuple[int, int]) -> None:
    new, context = zip(*chunks, strict=True)
    fit.note(new, context, seconds)


def test_known_coefficients_are_found_in_noise():
    rng, fit = random.Random(1), CostFit()
    for _ in range(200):
        chunk = rng.randrange(16, 4096), rng.choice([0, 1000, 30_000])
        note(fit, seconds_of(TRUTH, chunk) * rng.uniform(0.97, 1.03), chunk)
    for chunk in ((500, 0), (4000, 0), (430, 32_000)):
        assert seconds_of(fit.cost(), chunk) == pytest.approx(seconds_of(TRUTH, chunk), rel=0.1)


def test_pairs_with_a_prefix_may_cost_more_than_without():
    rng, fit = random.Random(2), CostFit()
    shapes = [(n, c) for n in (64, 256, 1024, 4096) for c in (0, 256, 1024, 4096, 16_384)]
    for _ in range(10):
        for chunk in shapes:
            seconds = seconds_of(CPU_LIKE, chunk) * rng.uniform(0.97, 1.03)
            fit.note([chunk[0]], [chunk[1]], seconds, weight=relative(seconds))
    for batch in ([(2000, 0)], [(2000, 2000)], [(100, 8000)], [(300, 0), (300, 4000)]):
        found, truth = seconds_of(fit.cost(), *batch), seconds_of(CPU_LIKE, *batch)
        assert found == pytest.approx(truth, rel=0.1), batch


def test_layers_with_a_window_are_told_apart_from_those_with_all_tokens():
    """Two thirds of the layers look back 128 tokens: a long context costs a third."""
    truth = PrefillCost(0.002, 1e-5, 2e-8, window_pair_s=4e-8, window_tokens=128)
    rng, fit = random.Random(4), CostFit(window_tokens=128)
    for _ in range(20):
        for chunk in [(n, c) for n in (64, 128, 256, 1024, 4096) for c in (0, 64, 1024, 16_384)]:
            seconds = seconds_of(truth, chunk) * rng.uniform(0.97, 1.03)
            fit.note([chunk[0]], [chunk[1]], seconds, weight=relative(seconds))
    for batch in ([(300, 0)], [(2000, 64)], [(64, 64_000)], [(512, 32_000), (512, 0)]):
        found, truly = seconds_of(fit.cost(), *batch), seconds_of(truth, *batch)
        assert found == pytest.approx(truly, rel=0.1), batch


def test_it_follows_an_engine_that_becomes_slower():
    fit = CostFit()
    for speed in (1.0, 3.0):
        for n in range(150):
            chunk = 200 + 37 * n % 900, 0
            note(fit, speed * seconds_of(PrefillCost(0.01, 1e-4, 0), chunk), chunk)
    expected = 3 * seconds_of(PrefillCost(0.01, 1e-4, 0), (800, 0))
    assert seconds_of(fit.cost(), (800, 0)) == pytest.approx(expected, rel=0.1)


def test_a_profile_keeps_its_shape_where_the_traffic_shows_none():
    """All batches alike, and slower than at the profile: every length is corrected alike."""
    fit = CostFit(CPU_LIKE)
    assert fit.cost() == CPU_LIKE
    for _ in range(100):
        note(fit, 1.5 * seconds_of(CPU_LIKE, (1024, 4096)), (1024, 4096))
    for chunk in ((1024, 4096), (4096, 0), (64, 16_384), (512, 512)):
        expected = 1.5 * seconds_of(CPU_LIKE, chunk)
        assert seconds_of(fit.cost(), chunk) == pytest.approx(expected, rel=0.05), chunk


def test_a_forward_that_was_held_up_spoils_little():
    fit, chunk = CostFit(CPU_LIKE), (200, 2816)
    for n in range(20):
        note(fit, seconds_of(CPU_LIKE, chunk) * (20 if n == 3 else 1), chunk)
    assert seconds_of(fit.cost(), chunk) == pytest.approx(seconds_of(CPU_LIKE, chunk), rel=0.1)


def test_an_engine_far_slower_than_its_profile_is_followed():
    fit, chunk = CostFit(CPU_LIKE), (1024, 4096)
    for _ in range(40):
        note(fit, 5 * seconds_of(CPU_LIKE, chunk), chunk)
    expected = 5 * seconds_of(CPU_LIKE, chunk)
    assert seconds_of(fit.cost(), chunk) == pytest.approx(expected, rel=0.25)


def test_traffic_overrules_a_profile_that_was_wrong():
    fit, rng = CostFit(PrefillCost(0.0, 0.0, 4e-8)), random.Random(3)
    for _ in range(300):
        chunk = rng.randrange(64, 4096), rng.choice([0, 1024, 8192])
        note(fit, seconds_of(CPU_LIKE, chunk), chunk)
    for chunk in ((2000, 0), (2000, 2000), (500, 8000)):
        assert seconds_of(fit.cost(), chunk) == pytest.approx(seconds_of(CPU_LIKE, chunk), rel=0.2)


def test_nothing_is_said_of_too_little():
    fit = CostFit()
    for _ in range(10):
        assert fit.cost() is None
        note(fit, 0.01, (20, 0))
    note(fit, 0.02, (100, 0))
    assert fit.cost() is not None


@examples(200)
@given(
    st.lists(
        st.tuples(st.integers(1, 9000), st.integers(0, 60_000), st.floats(0, 10)),
        min_size=3,
        max_size=30,
    ),
    st.sampled_from([None, CPU_LIKE]),
    st.sampled_from([0, 128]),
)
def test_no_term_is_ever_negative(samples, profile, window_tokens):
    fit = CostFit(profile, window_tokens)
    for new, context, seconds in samples:
        note(fit, seconds, (new, context), (256, 0))
    assert min(fit.cost().coefficients()) >= 0
