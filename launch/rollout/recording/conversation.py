"""What a request of an agent says, on each of the three routes, in a form in which one request can
be found in a later one that goes on from it.

Agents do not repeat a model's answer byte for byte: fields without a value come and go, arguments
of calls are written anew, marks of caches move. What must be the same is who said what.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import msgspec

from common.json import JsonObject
from launch.gateway.request.parts import CHAT, MESSAGES, RESPONSES

ROUTES = (CHAT, MESSAGES, RESPONSES)
_BEFORE_ALL = (
    *("system", "instructions", "tools", "chat_template_kwargs"),
    *("thinking", "reasoning", "reasoning_effort"),
)
"""Fields that a template may put before the messages, or by which it writes them."""
_SERVERS_OWN = ("id", "status")
"""Of a message: what the server has given it, and few clients send back."""
_MARK = "cache_control"
"""Of any block: Anthropic's clients move it on from turn to turn."""


class Said(msgspec.Struct, frozen=True):
    """By the model, in one turn."""

    text: str
    calls: tuple[tuple[str, str], ...]
    """Name, and arguments as JSON with sorted keys."""


class Item(msgspec.Struct, frozen=True):
    """A message, or all that the model said in one turn: ``[begin, end)`` of a request's list."""

    said: Said | None
    """None: somebody else said it."""
    content: bytes
    begin: int
    end: int


def messages_of(path: str, body: JsonObject) -> list[JsonObject]:
    """The list of what was said; raises ``TypeError`` if there is none."""
    given = body.get("input" if path == RESPONSES else "messages")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise TypeError("a request needs a list of messages")
    return given


def items_of(path: str, messages: list[JsonObject]) -> list[Item]:
    """In their order. On ``/v1/responses`` a turn of the model's may be many elements."""
    items: list[Item] = []
    for place, message in enumerate(messages):
        if not _is_the_models(message):
            meant = {k: v for k, v in message.items() if v is not None and k not in _SERVERS_OWN}
            items.append(Item(None, _canonical(meant), place, place + 1))
            continue
        said, begin = _said(path, message), place
        if path == RESPONSES and items and (before := items[-1].said) is not None:
            begin = items.pop().begin
            text = "\n".join(text for text in (before.text, said.text) if text)
            said = Said(text, before.calls + said.calls)
        items.append(Item(said, msgspec.json.encode(said), begin, place + 1))
    return items


def digests(path: str, body: JsonObject, items: list[Item]) -> list[bytes]:
    """Of all that stands before each item, and of all of them: one more than there are items."""
    context = {name: body[name] for name in _BEFORE_ALL if body.get(name) is not None}
    chain = [hashlib.blake2b(path.encode() + _canonical(context), digest_size=16).digest()]
    for item in items:
        chain.append(after(chain[-1], item))
    return chain


def after(digest: bytes, item: Item) -> bytes:
    """The digest of what ``digest`` is of, with one item more."""
    kind = b"model" if item.said is not None else b"other"
    return hashlib.blake2b(digest + kind + item.content, digest_size=16).digest()


def with_answer(path: str, body: JsonObject, item: Item, text: str) -> JsonObject:
    """The request, in which the model said ``text`` and nothing else in place of ``item``."""
    messages = messages_of(path, body)
    plain: JsonObject = {"role": "assistant", "content": text}
    replaced = [*messages[: item.begin], plain, *messages[item.end :]]
    return body | {"input" if path == RESPONSES else "messages": replaced}


# ---- the model's own ----------------------------------------------------------------------


def _is_the_models(message: JsonObject) -> bool:
    kind = message.get("type")
    return message.get("role") == "assistant" or kind in ("function_call", "reasoning")


def _said(path: str, message: JsonObject) -> Said:
    texts = [text for text in _texts(message.get("content")) if text]
    calls = tuple(_calls(path, message))
    return Said("".join(texts).strip(), calls)


def _texts(content: object) -> Iterator[str]:
    """Without what it thought: few clients send that back."""
    if isinstance(content, str):
        yield content
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict) and block.get("type") in ("text", "output_text"):
            yield str(block.get("text") or "")


def _calls(path: str, message: JsonObject) -> Iterator[tuple[str, str]]:
    if path == RESPONSES and message.get("type") == "function_call":
        yield str(message.get("name")), _arguments(message.get("arguments"))
    for call in _dicts(message.get("tool_calls")):
        function = call.get("function")
        if isinstance(function, dict):
            yield str(function.get("name")), _arguments(function.get("arguments"))
    for block in _dicts(message.get("content")):
        if block.get("type") == "tool_use":
            yield str(block.get("name")), _arguments(block.get("input"))


def _arguments(given: object) -> str:
    value = given
    if isinstance(given, str):
        try:
            value = msgspec.json.decode(given or "{}")
        except msgspec.DecodeError:  # the model's JSON may be none
            return given
    return msgspec.json.encode(value, order="sorted").decode()


def _dicts(value: object) -> Iterator[JsonObject]:
    if isinstance(value, list):
        yield from (one for one in value if isinstance(one, dict))


def _canonical(value: object) -> bytes:
    return msgspec.json.encode(_unmarked(value), order="sorted")


def _unmarked(value: object) -> object:
    if isinstance(value, dict):
        return {name: _unmarked(inner) for name, inner in value.items() if name != _MARK}
    if isinstance(value, list):
        return [_unmarked(one) for one in value]
    return value
