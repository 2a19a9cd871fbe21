"""Several engines' answers as the one that SGLang would have given.

Choices keep the order prompt by prompt, sample by sample; usage counts a prompt once
for all its samples, as SGLang's ``UsageProcessor`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from launch.gateway.request.parts import GENERATE

DONE = b"data: [DONE]\n\n"
_PREFIX = b"data:"
_INPUT_LOGPROBS = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")


def parse_event(event: bytes) -> Any:
    """The JSON of a server-sent event; None for ``[DONE]`` and comments."""
    data = event.strip()
    if not data.startswith(_PREFIX) or data.endswith(b"[DONE]"):
        return None
    return msgspec.json.decode(data[len(_PREFIX) :])


def build_event(value: Any) -> bytes:
    return _PREFIX + b" " + msgspec.json.encode(value) + b"\n\n"


def merge_answers(path: str, rid: str, answers: Sequence[Any], samples: int) -> Any:
    """One JSON answer of many, in the order of their parts."""
    if path == GENERATE:
        return list(answers)
    choices = [
        {**choice, "index": index}
        for index, answer in enumerate(answers)
        for choice in answer["choices"][:1]
    ]
    merged = {**answers[0], "id": rid, "choices": choices}
    usages = [answer.get("usage") for answer in answers]
    if all(usages):
        merged["usage"] = merge_usage(usages, samples)
    return merged


def merge_usage(usages: Sequence[dict[str, Any]], samples: int) -> dict[str, Any]:
    """Usage of all parts: prompts of every ``samples``-th one, completions of each."""
    firsts = usages[::samples]
    prompt_tokens = sum(u["prompt_tokens"] for u in firsts)
    completion_tokens = sum(u["completion_tokens"] for u in usages)
    merged = dict(usages[0])
    merged["prompt_tokens"] = prompt_tokens
    merged["completion_tokens"] = completion_tokens
    merged["total_tokens"] = prompt_tokens + completion_tokens
    for field, counted in (
        ("prompt_tokens_details", firsts),
        ("completion_tokens_details", usages),
    ):
        details = [u[field] for u in counted if u.get(field)]
        if details:
            merged[field] = _sum_fields(details)
    if "reasoning_tokens" in merged:
        merged["reasoning_tokens"] = sum(u.get("reasoning_tokens") or 0 for u in usages)
    return merged


def _sum_fields(details: Sequence[dict[str, Any]]) -> dict[str, Any]:
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
        self._usages: list[dict[str, Any] | None] = [None] * parts
        self._last_chunk: dict[str, Any] = {}

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


def add_input_logprobs(answer: dict[str, Any], prefill_answer: dict[str, Any]) -> dict[str, Any]:
    """A ``/generate`` answer of D with the prompt's logprobs, which only P has computed."""
    meta = answer.get("meta_info")
    prefill_meta = prefill_answer.get("meta_info")
    if isinstance(meta, dict) and isinstance(prefill_meta, dict):
        for field in _INPUT_LOGPROBS:
            if prefill_meta.get(field):
                meta[field] = prefill_meta[field] + (meta.get(field) or [])
    return answer


def error_of(answer: Any) -> tuple[int, str] | None:
    """Status and message if an answer or event says that SGLang gave up; None otherwise.

    An abort without a status is somebody's wish (or a load that failed): status 500.
    """
    if not isinstance(answer, dict):
        return None
    error = answer.get("error")
    if error is not None:
        fields = error if isinstance(error, dict) else {"message": str(error)}
        code = fields.get("code")
        return (code if isinstance(code, int) else 500), str(fields.get("message"))
    meta = answer.get("meta_info")
    reason = meta.get("finish_reason") if isinstance(meta, dict) else None
    if isinstance(reason, dict) and reason.get("type") == "abort":
        status = reason.get("status_code")
        return (status if isinstance(status, int) else 500), str(reason.get("message"))
    choices = answer.get("choices")
    if isinstance(choices, list) and any(c.get("finish_reason") == "abort" for c in choices):
        return 500, "aborted"
    return None
