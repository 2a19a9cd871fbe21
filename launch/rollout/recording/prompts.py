"""Token ids of a request that goes on from a recorded turn: that turn's own, and those of what is
new, which SGLang's template and tokenizer make.

What is new is found by having a route render the request twice, each time with another short text
in place of the turn's answer: what both renderings end with is what closes an answer, and all that
was said after it. So it does not matter how the template writes the answer itself, nor that it
leaves out of earlier ones what the model thought.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import numpy as np

from common.json import JsonObject
from launch.rollout.errors import RequestFailed
from launch.rollout.recording.conversation import with_answer
from launch.rollout.recording.turns import Asked, RecordedTurn

_TEXTS = ("x", "y")
_TEXT_TOKENS_MAX = 8
"""Of the short text in a rendering; more that differs is not of it alone."""


class Renderer(Protocol):
    """Of the cluster."""

    async def prompt_ids(self, path: str, body: JsonObject) -> list[int]:
        """What a route makes of a body; raises :class:`RequestFailed`."""


async def prompt_of(renderer: Renderer, asked: Asked) -> list[int]:
    """The ids to send; where a turn cannot be gone on from, ``asked.turn`` is none any more.
    Raises :class:`RequestFailed`."""
    if asked.turn is not None:
        following = await _following(renderer, asked)
        if following is not None:
            return asked.turn.ids + _unclosed(asked.turn, following)
        asked.turn = None
    return await renderer.prompt_ids(asked.path, asked.body)


async def _following(renderer: Renderer, asked: Asked) -> list[int] | None:
    """What closes the answer, and what comes after it; None if the template does not say."""
    assert asked.answer is not None
    bodies = [with_answer(asked.path, asked.body, asked.answer, text) for text in _TEXTS]
    try:
        one, other = await asyncio.gather(
            *(renderer.prompt_ids(asked.path, body) for body in bodies)
        )
    except RequestFailed:  # such as a template that wants a call before a tool's result
        return None
    same_head, same_tail = _same(one, other), _same(one[::-1], other[::-1])
    longest = max(len(one), len(other))
    if one == other or same_tail == 0 or longest - same_head - same_tail > _TEXT_TOKENS_MAX:
        return None
    return one[len(one) - same_tail :]


def _unclosed(turn: RecordedTurn, following: list[int]) -> list[int]:
    """``following`` without the closing token, where the model has closed its answer itself."""
    generated = turn.answer.token_ids
    if not generated:
        return following
    is_closed = generated[-1] in (following[0], turn.matched)
    return following[1:] if is_closed else following


def _same(one: list[int], other: list[int]) -> int:
    """How many ids both begin with."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(np.array(one[:length]) != np.array(other[:length]))
    return int(differs[0]) if differs.size else length
