"""Places for requests, and the account of how full they were."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.rollout.slots import BINS_MAX, Use
from tests.examples import examples

LIMIT = 8


@examples(100)
@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, LIMIT)), min_size=1, max_size=30))
def test_the_course_of_requests_in_flight_is_that_of_the_job(steps):
    """Its area is the requests' time, no mean exceeds what was in flight, none is lost."""
    now_s = area = full_s = 0.0
    with patch("launch.rollout.slots.time.monotonic", lambda: now_s):
        use = Use(LIMIT)
        use.could_be(LIMIT)
        for seconds, in_flight in steps:
            use.are(in_flight)
            now_s += seconds
            area += seconds * in_flight
            full_s += seconds * (in_flight == LIMIT)
        found = use.summary()
    course, step_s = found.in_flight, found.step_s
    assert len(course) <= BINS_MAX + 1
    assert max(course) <= max(in_flight for _, in_flight in steps) + 0.01
    lengths = [step_s] * (len(course) - 1)
    lengths.append(now_s - sum(lengths))
    by_course = sum(mean * length for mean, length in zip(course, lengths, strict=True))
    assert by_course == pytest.approx(area, abs=0.01 * now_s + 1e-6)
    assert found.mean_share * LIMIT * now_s == pytest.approx(area, abs=1e-3 * now_s + 1e-6)
    assert found.full_share * now_s == pytest.approx(full_s, abs=1e-4 * now_s + 1e-6)
