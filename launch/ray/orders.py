"""What an operator may order of a driver, and what it answers."""

from __future__ import annotations

from enum import Enum

import msgspec

from common.json import JsonObject


class Order(msgspec.Struct, frozen=True):
    """Another number of nodes."""

    changes: dict[str, str] = msgspec.field(default_factory=dict)
    """By role or pool: a number, +1, -1."""
    profile: JsonObject | None = None
    """What a file of pools says; before ``changes``."""


class Outcome(Enum):
    """Of an order."""

    REFUSED = "refused"
    TAKEN = "taken"
    DONE = "done"


class Answer(msgspec.Struct, frozen=True):
    """The driver's."""

    outcome: Outcome
    text: str
    """Why, or what is not so yet."""
