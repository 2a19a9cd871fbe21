"""Words of an engine's completion board, which agents write one-sidedly: no message is sent.

A uint64 each: the job's number in the upper 48 bits, a code in the lower 16. The job's number
makes a stale word of an earlier job in the same slot harmless.
"""

from __future__ import annotations

from common.ids import JobId

BOARD_WORD_BYTES = 8
FAILED = 0xFFFF
"""Code of a job that will not complete; otherwise the code is the layers delivered."""


def board_word(job: JobId, code: int) -> int:
    """The word that says so."""
    return job << 16 | code


def code_for(job: JobId, word: int) -> int:
    """What a word says of a job: 0, no layer yet, if it is another one's."""
    return word & 0xFFFF if word >> 16 == job else 0
