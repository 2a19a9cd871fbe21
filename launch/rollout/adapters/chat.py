"""A chat at the URL of a harness's episode, its row, and its result (docs/rollout.md)."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path

import msgspec

from common.json import JsonObject
from launch.gateway.request.parts import CHAT

_REFUSED = 400


class Over(Exception):
    """The job lets the episode say no more: it has had its turns, or its tokens."""


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message


class _Answer(msgspec.Struct):
    choices: list[_Choice]


def row() -> JsonObject:
    """The input row of this episode."""
    fields: JsonObject = json.loads(Path(os.environ["ROLLOUT_ROW"]).read_text())
    return fields


def finish(reward: float) -> None:
    """The episode's result."""
    Path(os.environ["ROLLOUT_RESULT"]).write_text(json.dumps({"reward": reward}))


class Chat:
    """With the model. It begins with the row's ``prompt`` or ``messages``."""

    def __init__(self, fields: JsonObject) -> None:
        given = fields.get("messages")
        text: JsonObject = {"role": "system", "content": fields.get("prompt") or ""}
        self._messages: list[JsonObject] = list(given) if isinstance(given, list) else [text]

    def say(self, text: str) -> str:
        """What the model answers; raises :class:`Over`, and ``OSError`` for what else fails."""
        self._messages.append({"role": "user", "content": text})
        data = json.dumps({"model": "default", "messages": self._messages}).encode()
        url, headers = os.environ["ROLLOUT_BASE_URL"] + CHAT, {"content-type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
                [choice] = msgspec.json.decode(answer.read(), type=_Answer).choices
        except urllib.error.HTTPError as error:
            if error.code == _REFUSED:
                raise Over(error.read().decode(errors="replace")) from error
            raise
        said = choice.message.content or ""
        self._messages.append({"role": "assistant", "content": said})
        return said
