"""Completion words: a job's own, and nobody else's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.board_word import FAILED, board_word, code_for
from common.ids import JobId

JOBS = st.integers(1, (1 << 48) - 1).map(JobId)


@given(JOBS, JOBS, st.integers(0, FAILED))
def test_a_completion_word_says_nothing_of_another_job(job, other, code):
    word = board_word(job, code)
    assert 0 <= word < 1 << 64
    assert code_for(job, word) == code
    assert code_for(other, word) == (code if other == job else 0)
