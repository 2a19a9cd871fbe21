"""Several engines' answers as the one that SGLang would have given.

Choices keep the order prompt by prompt, sample by sample; usage counts a prompt once
for all its samples, as SGLang's ``UsageProcessor`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import msgspec

from common.json import JsonObject
from launch.gateway.errors import EngineRefused
from launch.gateway.request.parts import GENERATE

DONE = b"data: [DONE]\n\n"
_PREFIX = b"data:"
_INPUT_LOGPROBS = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")


TokenCounts = dict[str, int | None]


class Usage(TypedDict, total=False):
    """Tokens of an answer, as OpenAI counts them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenCounts | None
    completion_tokens_details: TokenCounts | None
    reasoning_tokens: int | None


class EngineAnswer(TypedDict, total=False):
    """An engine's answer or a chunk of one: what of it is looked at. All else is passed on."""

    id: str
    index: int
    text: str
    choices: list[JsonObject]
    usage: Usage | None
    meta_info: JsonObject
    error: object
    output_ids: list[int]
    object: str
    created: int
    model: str


def parse_event(event: bytes) -> EngineAnswer | None:
    """The JSON of a server-sent event; None for ``[DONE]`` and comments."""
    data = event.strip()
    if data.startswith(b"event:"):
        data = data.partition(b"\n")[2]
    if not data.startswith(_PREFIX) or data.endswith(b"[DONE]"):
        return None
    chunk: EngineAnswer = msgspec.json.decode(data[len(_PREFIX) :])
    return chunk


def build_event(value: EngineAnswer) -> bytes:
    return _PREFIX + b" " + msgspec.json.encode(value) + b"\n\n"


def merge_answers(rid: str, answers: Sequence[EngineAnswer], samples: int) -> EngineAnswer:
    """One OpenAI answer of many, in the order of their parts."""
    choices: list[JsonObject] = [
        {**choice, "index": index}
        for index, answer in enumerate(answers)
        for choice in answer["choices"][:1]
    ]
    merged: EngineAnswer = {**answers[0], "id": rid, "choices": choices}
    usages = [usage for answer in answers if (usage := answer.get("usage"))]
    if len(usages) == len(answers):
        merged["usage"] = merge_usage(usages, samples)
    return merged


def merge_usage(usages: Sequence[Usage], samples: int) -> Usage:
    """Usage of all parts: prompts of every ``samples``-th one, completions of each."""
    firsts = usages[::samples]
    prompt_tokens = sum(u["prompt_tokens"] for u in firsts)
    completion_tokens = sum(u["completion_tokens"] for u in usages)
    merged = usages[0].copy()
    merged["prompt_tokens"] = prompt_tokens
    merged["completion_tokens"] = completion_tokens
    merged["total_tokens"] = prompt_tokens + completion_tokens
    if details := [d for u in firsts if (d := u.get("prompt_tokens_details"))]:
        merged["prompt_tokens_details"] = _sum_fields(details)
    if details := [d for u in usages if (d := u.get("completion_tokens_details"))]:
        merged["completion_tokens_details"] = _sum_fields(details)
    if "reasoning_tokens" in merged:
        merged["reasoning_tokens"] = sum(u.get("reasoning_tokens") or 0 for u in usages)
    return merged


def _sum_fields(details: Sequence[TokenCounts]) -> TokenCounts:
    return {
        key: value if value is None else sum(d.get(key) or 0 for d in details)
        for key, value in details[0].items()
    }


class StreamMerger:
    """Interleaves the parts' event streams; usage chunks become one, at the end."""

    def __init__(self, path: str, rid: str, parts: int, samples: int) -> None:
        self._path = path
        self._rid = rid
        self._samples = samples
        self._usages: list[Usage | None] = [None] * parts
        self._last_chunk: EngineAnswer = {}

    def take(self, index: int, event: bytes) -> bytes:
        """Part ``index``'s event as the client gets it; empty if it is held back."""
        chunk = parse_event(event)
        if chunk is None:
            return b""
        if "error" in chunk:
            return event
        if self._path == GENERATE:
            return build_event({**chunk, "index": index})
        chunk["id"] = self._rid
        for choice in chunk["choices"]:
            choice["index"] = index
        if not chunk["choices"] and chunk.get("usage"):
            self._usages[index] = chunk["usage"]
            self._last_chunk = chunk
            return b""
        return build_event(chunk)

    def finish(self) -> bytes:
        """What follows the last part's end."""
        usages = [usage for usage in self._usages if usage is not None]
        if not usages or len(usages) < len(self._usages):
            return DONE
        usage = merge_usage(usages, self._samples)
        return build_event({**self._last_chunk, "usage": usage}) + DONE


def add_input_logprobs(answer: EngineAnswer, prefill_answer: EngineAnswer) -> EngineAnswer:
    """A ``/generate`` answer of D with the prompt's logprobs, which only P has computed."""
    meta = answer.get("meta_info")
    prefill_meta = prefill_answer.get("meta_info")
    if isinstance(meta, dict) and isinstance(prefill_meta, dict):
        for field in _INPUT_LOGPROBS:
            prompt, rest = prefill_meta.get(field), meta.get(field)
            if isinstance(prompt, list) and prompt:
                meta[field] = [*prompt, *(rest if isinstance(rest, list) else ())]
    return answer


def in_one_shape(event: bytes) -> bytes:
    """An event of a stream; an engine's error in it gets the shape of all errors."""
    if b'"error"' not in event or (chunk := parse_event(event)) is None or "error" not in chunk:
        return event
    status, message = error_of(chunk) or (500, "")
    return EngineRefused(status, msgspec.json.encode({"message": message})).event()


def cannot_be_met(message: str) -> bool:
    """Whether SGLang failed with a request's grammar, which allows no token any more: that is no
    failure of the engine, though SGLang calls it one."""
    return "Grammar accept_token failed" in message


def error_of(answer: object) -> tuple[int, str] | None:
    """Status and message if an answer or event says that SGLang gave up; None otherwise.

    An abort without a status is somebody's wish (or a load that failed): status 500.
    """
    if not isinstance(answer, dict):
        return None
    if isinstance(response := answer.get("response"), dict):  # an event of /v1/responses
        answer = response
    error = answer.get("error")
    if error is not None:
        fields = error if isinstance(error, dict) else {"message": str(error)}
        code = fields.get("code")
        if not isinstance(code, int):  # /v1/messages has a word for it
            code = 400 if fields.get("type") == "invalid_request_error" else 500
        return code, str(fields.get("message"))
    meta = answer.get("meta_info")
    reason = meta.get("finish_reason") if isinstance(meta, dict) else None
    if isinstance(reason, dict) and reason.get("type") == "abort":
        status = reason.get("status_code")
        return (status if isinstance(status, int) else 500), str(reason.get("message"))
    choices = answer.get("choices")
    if isinstance(choices, list) and any(c.get("finish_reason") == "abort" for c in choices):
        return 500, "aborted"
    return None
