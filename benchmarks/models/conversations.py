"""Conversations of three turns whose prompts end around pages, windows and tracks."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

TURNS = 3
UNITS = (64, 128, 256)
"""Tokens of a page, of the tiny models' windows, between SGLang's tracks of recurrent states."""
OFFSETS = (-1, 0, 1)
LONG_TOKENS = 1100
"""A prefill engine computes it in three chunks."""
VOCABULARY = range(300, 2000)
"""Ordinary words, no special token among them."""

Conversation = list[list[int]]
"""Its prompts; each begins with the one before and the right answer to it."""


def first_length(number: int) -> int:
    """Tokens of the first prompt of a conversation, by its number."""
    if number % 10 == 9:
        return LONG_TOKENS + number // 10
    return _near(64 * (number // 3 % 4), number)


def next_length(tokens: int, number: int) -> int:
    """Of the prompt behind a prompt and its answer of so many tokens."""
    return _near(tokens, number)


def _near(tokens: int, number: int) -> int:
    """The next length behind ``tokens`` that is at, just before or just behind a boundary."""
    unit, offset = UNITS[number // len(OFFSETS) % len(UNITS)], OFFSETS[number % len(OFFSETS)]
    boundary = (tokens + 1 - offset + unit - 1) // unit * unit
    return max(boundary, unit) + offset


async def converse(
    prompts: int, answer: Callable[[list[int]], Awaitable[list[int]]], seed: int = 1
) -> list[Conversation]:
    """At least so many prompts in all; ``answer`` gives the right tokens."""
    rng = random.Random(seed)
    conversations = []
    for number in range(-(-prompts // TURNS)):
        conversation = [rng.choices(VOCABULARY, k=first_length(number))]
        replies = [await answer(conversation[0])]
        for turn in range(1, TURNS):
            before = conversation[-1] + replies[-1]
            length = next_length(len(before), number + turn)
            conversation.append(before + rng.choices(VOCABULARY, k=length - len(before)))
            replies.append(await answer(conversation[-1]))
        conversations.append(conversation)
    return conversations
