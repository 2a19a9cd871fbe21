"""A request that somebody has had ended: how engines say so, and what its client gets.

SGLang answers 200 with the tokens that there are and the finish reason ``abort``: that is no
failure of an engine. One without a token gets the same shape here: its engines may have none.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec

from launch.gateway.errors import BadRequest
from launch.gateway.request.answer import Answer
from launch.gateway.request.merge_answers import DONE, EngineAnswer, build_event
from launch.gateway.request.parts import CHAT, GENERATE, OF_EVENTS, Part

_BY_ORDER = "Aborted by AbortReq"
"""SGLang's reason where the order met the request between P and D, which it calls a failure."""


def is_ordered(answer: object) -> bool:
    """Whether an answer or event says that SGLang ended the request because it was told to: not for
    a trouble of its own, which has a status."""
    if not isinstance(answer, dict):
        return False
    meta = answer.get("meta_info")
    reason = meta.get("finish_reason") if isinstance(meta, dict) else None
    if isinstance(reason, dict) and reason.get("type") == "abort":
        return reason.get("status_code") is None or was_ordered(str(reason.get("message")))
    choices = answer.get("choices")
    if isinstance(choices, list) and any(c.get("finish_reason") == "abort" for c in choices):
        return True
    return was_ordered(str(answer.get("error") or ""))


def was_ordered(message: str) -> bool:
    """By what SGLang says of a request that it gave up."""
    return _BY_ORDER in message


def has_tokens(answer: Mapping[str, object]) -> bool:
    """Whether an answer holds some, as far as it says."""
    meta = answer.get("meta_info")
    if isinstance(meta, dict):
        return bool(meta.get("completion_tokens"))
    usage = answer.get("usage")
    return not isinstance(usage, dict) or bool(usage.get("completion_tokens"))


async def answer_aborted(answer: Answer, part: Part, version: str) -> None:
    """The client's answer, where there was no token yet. Raises ``BadRequest`` where its route has
    no such shape."""
    if part.path in OF_EVENTS:
        raise BadRequest("the request was aborted before it had a token")
    value = _of_generate(part, version) if part.path == GENERATE else _of_openai(part)
    if part.stream:
        answer.open(200, "text/event-stream")
        await answer.write(build_event(value) + DONE)
    else:
        answer.open(200, "application/json")
        await answer.write(msgspec.json.encode(value))


def _of_generate(part: Part, version: str) -> EngineAnswer:
    reason = {
        "type": "abort",
        "message": "Abort before prefill",
        "status_code": None,
        "err_type": None,
    }
    return {
        "text": "",
        "output_ids": [],
        "meta_info": {
            "id": part.rid,
            "finish_reason": reason,
            "prompt_tokens": len(part.token_ids or ()),
            "completion_tokens": 0,
            "cached_tokens": 0,
            "output_token_logprobs": [],
            "weight_version": version,
            "weight_versions": [],
        },
    }


def _of_openai(part: Part) -> EngineAnswer:
    tokens = len(part.token_ids or ())
    field = "delta" if part.stream else "message"
    content = {field: {"role": "assistant", "content": ""}} if part.path == CHAT else {"text": ""}
    kind = "chat.completion" if part.path == CHAT else "text_completion"
    value: EngineAnswer = {
        "id": part.rid,
        "object": f"{kind}.chunk" if part.stream and part.path == CHAT else kind,
        "created": int(time.time()),
        "model": str(part.body.get("model") or "default"),
        "choices": [{"index": 0, "finish_reason": "abort", "logprobs": None, **content}],
    }
    if not part.stream:
        value["usage"] = {
            "prompt_tokens": tokens,
            "completion_tokens": 0,
            "total_tokens": tokens,
        }
    return value
