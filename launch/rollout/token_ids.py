"""Token ids of prompts and of what follows in an episode.

An episode's ids only ever grow: what the engine generated stands as it came, never
tokenised again, so that log-probabilities belong to the tokens that are trained on and the
store's blocks stay hits. What a chat template puts around a message is found by rendering
messages behind a fixed short chat and taking what comes after it.
"""

from __future__ import annotations

from typing import Protocol

from common.json import JsonObject
from launch.rollout.env import Say
from launch.rollout.input.rows import Row


class CannotFollow(Exception):
    """What an environment said cannot be put behind the tokens so far."""


class Tokenizer(Protocol):
    """``/v1/tokenize``."""

    async def tokenize(self, **fields: object) -> list[int]: ...


class TokenIds:
    """For one job: remembers what the template does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._chat: tuple[list[int], list[int]] | None = None

    async def prompt(self, row: Row) -> list[int]:
        """Of the row's prompt; raises what the tokenizer does."""
        if row.input_ids is not None:
            return row.input_ids
        if row.messages is not None:
            return await self._tokenizer.tokenize(messages=row.messages)
        return await self._tokenizer.tokenize(prompt=row.prompt)

    async def following(self, say: Say, is_chat: bool, generated: list[int]) -> list[int]:
        """What comes after the ``generated`` ids of a turn, up to the next turn's first;
        raises :class:`CannotFollow`."""
        if say.token_ids is not None:
            return say.token_ids
        if not is_chat:
            if say.text is None:
                raise CannotFollow("messages for a row that is no chat: answer with text")
            return await self._tokenizer.tokenize(prompt=say.text, add_special_tokens=False)
        return await self._chat_turn(said_messages(say), generated)

    async def _chat_turn(self, messages: list[JsonObject], generated: list[int]) -> list[int]:
        head, closing = self._chat or await self._learn_chat()
        rendered = await self._tokenizer.tokenize(messages=[*_chat("x"), *messages])
        if rendered[: len(head)] != head:
            raise CannotFollow(
                "the model's chat template changes earlier messages when one is added: an "
                "episode of many turns cannot keep its tokens with it"
            )
        if generated and closing and generated[-1] == closing[0]:
            closing = closing[1:]  # the model closed its message itself
        return [*closing, *rendered[len(head) :]]

    async def _learn_chat(self) -> tuple[list[int], list[int]]:
        """The ids of a chat that ends with the model's message, and those that close it."""
        one, other = [
            await self._tokenizer.tokenize(messages=_chat(text), add_generation_prompt=False)
            for text in ("x", "y")
        ]
        same = 0
        while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
            same += 1
        self._chat = one, one[len(one) - same :]
        return self._chat


class NoTokenIds(TokenIds):
    """For a job whose prompts its harness makes of the rows: nothing of them is sent before."""

    async def prompt(self, row: Row) -> list[int]:
        return []


def said_messages(say: Say) -> list[JsonObject]:
    """As the messages of a chat."""
    if say.messages is not None:
        return say.messages
    return [{"role": "user", "content": say.text}] if say.text is not None else []


def _chat(answer: str) -> list[JsonObject]:
    return [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
