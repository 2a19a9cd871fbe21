"""Conversations of three turns whose prompts end around pages, windows and tracks."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

TURNS = 3
UNITS = (64, 128, 256)
"""Tokens of a page, of the tiny models' windows, between SGLang's tracks of recurrent states. Where
a page has as many as the last, that comes first."""
OFFSETS = (-1, 0, 1)
LONG_TOKENS = 1100
"""A prefill engine computes it in three chunks."""
VOCABULARY = range(300, 2000)
"""Ordinary words, no special token among them."""

DRAWS_MAX = 100
"""Of a prompt, until one has a right answer."""

Conversation = list[list[int]]
"""Its prompts; each begins with the one before and the right answer to it."""


Answer = Callable[[list[int]], Awaitable[list[int] | None]]
"""The right tokens; None where a prompt has none."""


class NoPrompt(Exception):
    """None of those that were drawn has a right answer."""


def first_length(number: int, page_tokens: int = UNITS[0]) -> int:
    """Tokens of the first prompt of a conversation, by its number."""
    if number % 10 == 9:
        return LONG_TOKENS + number // 10
    return _near(page_tokens * (number // 3 % 4), number, page_tokens)


def next_length(tokens: int, number: int, page_tokens: int = UNITS[0]) -> int:
    """Of the prompt behind a prompt and its answer of so many tokens."""
    return _near(tokens, number, page_tokens)


def _near(tokens: int, number: int, page_tokens: int) -> int:
    """The next length behind ``tokens`` that is at, just before or just behind a boundary."""
    units = UNITS if page_tokens == UNITS[0] else UNITS[::-1]
    unit, offset = units[number // len(OFFSETS) % len(units)], OFFSETS[number % len(OFFSETS)]
    boundary = (tokens + 1 - offset + unit - 1) // unit * unit
    return max(boundary, unit) + offset


async def converse(
    prompts: int, answer: Answer, page_tokens: int = UNITS[0], seed: int = 1
) -> list[Conversation]:
    """At least so many prompts in all, each with a right answer; raises :class:`NoPrompt`."""
    rng = random.Random(seed)
    conversations = []
    for number in range(-(-prompts // TURNS)):
        prompt, reply = await _draw(rng, [], first_length(number, page_tokens), answer)
        conversation = [prompt]
        for turn in range(1, TURNS):
            before = prompt + reply
            length = next_length(len(before), number + turn, page_tokens)
            prompt, reply = await _draw(rng, before, length, answer)
            conversation.append(prompt)
        conversations.append(conversation)
    return conversations


async def _draw(
    rng: random.Random, before: list[int], length: int, answer: Answer
) -> tuple[list[int], list[int]]:
    """A prompt that begins so, of so many tokens, and its answer."""
    for _ in range(DRAWS_MAX):
        prompt = before + rng.choices(VOCABULARY, k=length - len(before))
        reply = await answer(prompt)
        if reply is not None:
            return prompt, reply
    raise NoPrompt(f"{length} tokens: {DRAWS_MAX} prompts have no right answer")
