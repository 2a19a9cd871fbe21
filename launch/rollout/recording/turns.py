"""The turns of an episode, as trajectories: runs of turns of which each goes on from the last one.

A turn goes on from another if its request repeats that one's and its answer. Its ids then begin
with the other's prompt and what was generated, so that a trajectory's tokens only grow. The first
turn that goes on from another is of the same trajectory; a second one, a fork, begins one of its
own, for which all that was before it is a prompt: each generated token is trained on once. So does
a conversation that goes on from nothing: that of a sub-agent, or of an agent that wrote its
history anew.
"""

from __future__ import annotations

import msgspec

from common.json import JsonObject
from launch.rollout.answers import Generation
from launch.rollout.recording.conversation import Item, after, digests, items_of


class RecordedTurn(msgspec.Struct, eq=False):
    """One answer of the model's."""

    messages: list[JsonObject]
    """All that its request said, and the answer."""
    prompt_ids: list[int]
    answer: Generation
    matched: int | str | list[int] | None
    """What ended the answer, if it was a token or a string."""

    @property
    def ids(self) -> list[int]:
        """Of prompt and answer."""
        return self.prompt_ids + self.answer.token_ids


class Asked(msgspec.Struct):
    """A request, and where it goes on from: ``answer`` is the last of what it repeats."""

    path: str
    body: JsonObject
    messages: list[JsonObject]
    digest: bytes
    turn: RecordedTurn | None
    answer: Item | None


class Turns:
    """Of one episode."""

    def __init__(self) -> None:
        self.trajectories: list[list[RecordedTurn]] = []
        self._by_digest: dict[bytes, RecordedTurn] = {}

    @property
    def count(self) -> int:
        return sum(len(trajectory) for trajectory in self.trajectories)

    def asked(self, path: str, body: JsonObject, messages: list[JsonObject]) -> Asked:
        """Find the latest turn that a request goes on from."""
        items = items_of(path, messages)
        chain = digests(path, body, items)
        for place in range(len(items) - 2, -1, -1):  # what goes on says something more
            turn = self._by_digest.get(chain[place + 1])
            if turn is not None and items[place].said is not None:
                return Asked(path, body, messages, chain[-1], turn, items[place])
        return Asked(path, body, messages, chain[-1], None, None)

    def add(self, asked: Asked, turn: RecordedTurn, said: list[JsonObject]) -> None:
        """``turn`` has answered ``asked``; with ``said``."""
        for item in items_of(asked.path, said)[:1]:
            self._by_digest[after(asked.digest, item)] = turn
        for trajectory in self.trajectories:
            if trajectory[-1] is asked.turn:
                trajectory.append(turn)
                return
        self.trajectories.append([turn])
