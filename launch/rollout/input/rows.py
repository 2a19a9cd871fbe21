"""One row of the input: what may stand in it, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from common.json import JsonObject


class Sampling(msgspec.Struct, frozen=True):
    """How a sample's tokens were drawn."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int | None
    stop: list[str]


SAMPLING_COLUMNS = Sampling.__struct_fields__
PROMPT_COLUMNS = ("prompt", "messages", "input_ids")
KNOWN_COLUMNS = ("id", *PROMPT_COLUMNS, *SAMPLING_COLUMNS)
_CHARS_PER_TOKEN = 4
"""To compare lengths of texts and of token ids, for the order of a job."""


class Row(msgspec.Struct):
    """A row that can be sampled; exactly one of the three prompts is set. Sampling fields
    that are None are the job's."""

    id: str
    prompt: str | None = None
    messages: list[JsonObject] | None = None
    input_ids: list[int] | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    stop: list[str] | None = None

    @property
    def length(self) -> int:
        """About how many tokens the prompt has."""
        if self.input_ids is not None:
            return len(self.input_ids)
        text = self.prompt if self.prompt is not None else str(self.messages)
        return len(text) // _CHARS_PER_TOKEN


class Prompt(msgspec.Struct):
    """A row that is ready to be sampled."""

    number: int
    row: Row
    token_ids: list[int]


class BadRow(Exception):
    """A row that cannot be sampled; the text says why."""


def parse_row(fields: Mapping[str, object], number: int) -> Row:
    """Check the known columns of row ``number`` (from 0); raises :class:`BadRow`."""
    given = {name: fields[name] for name in KNOWN_COLUMNS if fields.get(name) is not None}
    given["id"] = _id(given.get("id", number))
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    if isinstance(messages := given.get("messages"), list):
        given["messages"] = [_message(message) for message in messages]
    try:
        row = msgspec.convert(given, Row)
    except msgspec.ValidationError as error:
        raise BadRow(str(error)) from error
    prompts = [name for name in PROMPT_COLUMNS if getattr(row, name) is not None]
    if len(prompts) != 1:
        found = " and ".join(prompts) or "none of them"
        raise BadRow(f"needs one of {', '.join(PROMPT_COLUMNS)}; it has {found}")
    if not getattr(row, prompts[0]):
        raise BadRow(f"{prompts[0]} is empty")
    _check_sampling(row)
    return row


def _id(value: object) -> str:
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    raise BadRow(f"id must be text or an integer, not {value!r}")


def _message(message: object) -> object:
    """Without the nulls that a Parquet struct has for absent keys."""
    if not isinstance(message, dict):
        return message
    if not isinstance(message.get("role"), str):
        raise BadRow("a message without a role")
    return {name: value for name, value in message.items() if value is not None}


def _check_sampling(row: Row) -> None:
    if row.temperature is not None and row.temperature < 0:
        raise BadRow(f"temperature {row.temperature} is negative")
    if row.top_p is not None and not 0 < row.top_p <= 1:
        raise BadRow(f"top_p {row.top_p} is not in (0, 1]")
    if row.max_new_tokens is not None and row.max_new_tokens < 1:
        raise BadRow(f"max_new_tokens {row.max_new_tokens} is less than 1")
    if row.input_ids is not None and not all(0 <= i < 2**31 for i in row.input_ids):
        raise BadRow("input_ids must be integers in [0, 2**31)")
