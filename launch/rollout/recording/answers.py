"""An answer as it passes by: what the model said, and the record of its tokens."""

from __future__ import annotations

import msgspec

from common.ids import RECORD
from common.json import JsonObject
from launch.gateway.request.merge_answers import parse_event
from launch.gateway.request.parts import CHAT, MESSAGES
from launch.rollout.answers import SglangSpan


class Finish(msgspec.Struct):
    """Why it ended; ``matched``: the token or string that ended it."""

    type: str
    matched: int | str | list[int] | None = None


class Record(msgspec.Struct):
    """Of a turn, from the engine (``engine/sglang/http/record.py``)."""

    output_ids: list[int]
    logprobs: list[float]
    """One for each of them."""
    finish_reason: Finish
    prompt_tokens: int
    cached_tokens: int
    weight_version: str
    weight_versions: list[SglangSpan]


# ---- what is read of answers -----------------------------------------------------------------


class _Call(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _NumberedCall(msgspec.Struct):
    index: int
    function: _Call


class _Delta(msgspec.Struct):
    content: str | None = None
    tool_calls: list[_NumberedCall] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Chunk(msgspec.Struct):
    """Of a chat."""

    choices: list[_Choice] = []


class _Block(msgspec.Struct, frozen=True):
    type: str = ""
    text: str = ""
    name: str = ""


class _BlockDelta(msgspec.Struct, frozen=True):
    text: str = ""
    partial_json: str = ""


class _Event(msgspec.Struct):
    """Of Anthropic's."""

    index: int = 0
    content_block: _Block = _Block()
    delta: _BlockDelta = _BlockDelta()


class _WholeChoice(msgspec.Struct):
    message: JsonObject


class _WholeChat(msgspec.Struct):
    choices: list[_WholeChoice]


class _WholeMessage(msgspec.Struct):
    content: list[JsonObject]


class _Response(msgspec.Struct):
    output: list[JsonObject]


class _Completed(msgspec.Struct):
    """The last event of ``/v1/responses``."""

    response: _Response


class Passing:
    """One answer of the route ``path``."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.record: Record | None = None
        self._text = ""
        self._calls: dict[int, _Call] = {}
        """Of a stream, by their number: name, and arguments as far as they have come."""
        self._whole: list[JsonObject] | None = None

    def messages(self) -> list[JsonObject]:
        """What the model said, as a later request of this route repeats it."""
        if self._whole is not None:
            return self._whole
        if self._path == CHAT:
            calls = [
                {"type": "function", "function": msgspec.structs.asdict(call)}
                for call in self._calls.values()
            ]
            message: JsonObject = {"role": "assistant", "content": self._text}
            return [message | ({"tool_calls": calls} if calls else {})]
        blocks: list[JsonObject] = [{"type": "text", "text": self._text}] if self._text else []
        for call in self._calls.values():
            given = _json_of(call.arguments or "")
            blocks.append({"type": "tool_use", "name": call.name, "input": given})
        return [{"role": "assistant", "content": blocks}]

    # ---- whole ------------------------------------------------------------------------

    def take_whole(self, data: bytes) -> bytes:
        """All of it; without the record, which is nothing for an agent."""
        fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        if (raw := fields.pop(RECORD, None)) is None:
            return data
        self.record = msgspec.json.decode(raw, type=Record)
        if self._path == CHAT:
            [choice] = msgspec.json.decode(data, type=_WholeChat).choices
            self._whole = [choice.message]
        elif self._path == MESSAGES:
            content = msgspec.json.decode(data, type=_WholeMessage).content
            self._whole = [{"role": "assistant", "content": content}]
        else:
            self._whole = msgspec.json.decode(data, type=_Response).output
        return msgspec.json.encode(fields)

    # ---- streamed ---------------------------------------------------------------------

    def take_event(self, event: bytes) -> bytes:
        """The next event with its blank line; nothing in place of the record's."""
        if (chunk := parse_event(event)) is None:
            return event
        fields: JsonObject = {**chunk}
        if fields.get("type") == RECORD:
            self.record = msgspec.convert(fields[RECORD], Record)
            return b""
        if self._path == CHAT:
            self._take_chunk(msgspec.convert(fields, _Chunk))
        elif self._path == MESSAGES:
            self._take_block(msgspec.convert(fields, _Event))
        elif fields.get("type") in ("response.completed", "response.incomplete"):
            self._whole = msgspec.convert(fields, _Completed).response.output
        return event

    def _take_chunk(self, chunk: _Chunk) -> None:
        for choice in chunk.choices:
            self._text += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                self._add_to_call(call.index, call.function.name, call.function.arguments)

    def _take_block(self, event: _Event) -> None:
        block, delta = event.content_block, event.delta
        if block.type == "tool_use":
            self._add_to_call(event.index, block.name, None)
        self._text += block.text + delta.text
        if delta.partial_json:
            self._add_to_call(event.index, None, delta.partial_json)

    def _add_to_call(self, number: int, name: str | None, arguments: str | None) -> None:
        call = self._calls.setdefault(number, _Call("", ""))
        call.name = (call.name or "") + (name or "")
        call.arguments = (call.arguments or "") + (arguments or "")


def _json_of(text: str) -> object:
    try:
        return msgspec.json.decode(text or "{}")
    except msgspec.DecodeError:  # the model's JSON may be none
        return text
