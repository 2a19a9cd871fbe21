"""What an episode of many turns talks to: ``--env module:Class``.

An environment is built once for each sample, ``Class(row)``, with the input row as a dict,
columns unknown to the job included. Its ``reply`` is awaited after every turn and answers
with :class:`Say` (go on) or :class:`Done`. ``close``, if it has one, is awaited at the end,
however that comes. An exception ends that episode as failed and no other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol, cast, runtime_checkable

import msgspec

from common.json import JsonObject


class Reply(msgspec.Struct, frozen=True):
    """What the model generated in one turn."""

    turn: int
    """0 is the first."""
    text: str
    token_ids: list[int]
    logprobs: list[float]
    """One for each token; empty without ``--logprobs``."""
    finish_reason: str
    """"stop", or "length" at the limit of tokens."""


class Say(msgspec.Struct, frozen=True):
    """The next message: exactly one of the three. ``messages`` and a string for a row that
    is a chat go through its chat template; elsewhere a string is tokenised as it is.
    """

    text: str | None = None
    """In a chat: the content of a user's message."""
    messages: list[JsonObject] | None = None
    """Such as ``[{"role": "tool", "content": "42"}]``."""
    token_ids: list[int] | None = None
    """Appended as they are."""


class Done(msgspec.Struct, frozen=True):
    """The end of the episode."""

    reward: float | None = None


class Env(Protocol):
    """One episode's environment. A ``close`` coroutine is optional."""

    async def reply(self, reply: Reply) -> Say | Done: ...


@runtime_checkable
class KnowsLateness(Protocol):
    """An environment that says itself what the model is told where ``reply`` took longer than
    ``--env-timeout-s`` (and was cancelled), with ``--on-env-timeout observe``."""

    async def timed_out(self, reply: Reply) -> Say | Done: ...


class BadEnv(Exception):
    """``--env`` names nothing that can be built; the text says why."""


def load_env(name: str) -> Callable[[JsonObject], Env]:
    """The class ``module:Class``; raises :class:`BadEnv`."""
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise BadEnv("write it as module:Class")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BadEnv(str(error)) from error
    if not callable(getattr(found, "reply", None)):
        raise BadEnv(f"{attribute} has no method reply(reply)")
    return cast(Callable[[JsonObject], Env], found)
