"""A stub engine's answers, in the shapes of SGLang's routes: of an engine that has generated these
words, was aborted by order ("ordered"), gave up ("abort"), or whose stream has no end ("break")."""

from __future__ import annotations

import json
from typing import Any

from launch.gateway.request.parts import MESSAGES, RESPONSES

WORDS = ["one ", "two ", "three"]
PREFILL_LOGPROBS = [[-0.5, 7, None]]


def whole_answer(role: str, path: str, body: dict[str, Any], fault: str) -> dict[str, Any]:
    words = WORDS[:1] if role == "prefill" else WORDS
    reason = "abort" if fault == "ordered" else "length"
    text = "".join(words)
    if path == "/generate":
        meta: dict[str, Any] = {"id": body["rid"], "finish_reason": {"type": reason}}
        if body.get("return_logprob"):
            meta["input_token_logprobs"] = PREFILL_LOGPROBS if role == "prefill" else []
        return {"text": text, "meta_info": meta}
    if path in (MESSAGES, RESPONSES):
        return named_answer(path, body, fault)
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
    if path == "/v1/completions":
        choice["text"] = text
    else:
        choice["message"] = {"role": "assistant", "content": text}
    usage = usage_of(body)
    return {"id": body["rid"], "object": "stub", "choices": [choice], "usage": usage}


def usage_of(body: dict[str, Any]) -> dict[str, Any]:
    prompt_tokens = len(body.get("input_ids") or body["prompt"])
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(WORDS),
        "total_tokens": prompt_tokens + len(WORDS),
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def named_answer(path: str, body: dict[str, Any], fault: str) -> dict[str, Any]:
    text = "".join(WORDS)
    if path == MESSAGES:
        return {"type": "message", "content": [{"type": "text", "text": text}]}
    failed = {"status": "failed", "error": {"code": "server_error", "message": "load failed"}}
    done = {"status": "completed", "error": None, "output": [{"text": text}]}
    return {"id": body["request_id"], **(failed if fault == "abort" else done)}


def named_events(path: str, body: dict[str, Any], fault: str) -> list[bytes]:
    events = _of_messages(fault) if path == MESSAGES else _of_responses(body, fault)
    events = events[:-1] if fault == "break" else events
    return [f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in events]


def _of_messages(fault: str) -> list[dict[str, Any]]:
    error = {"type": "error", "error": {"type": "api_error", "message": "load failed"}}
    deltas = [{"type": "content_block_delta", "delta": {"text": word}} for word in WORDS]
    middle = [error] if fault == "abort" else deltas
    return [{"type": "message_start"}, *middle, {"type": "message_stop"}]


def _of_responses(body: dict[str, Any], fault: str) -> list[dict[str, Any]]:
    answer = {"id": body["request_id"], "error": None}
    begun = [{"type": f"response.{how}", "response": answer} for how in ("created", "in_progress")]
    if fault == "abort":
        error = {"code": "server_error", "message": "load failed"}
        return [*begun, {"type": "response.failed", "response": {**answer, "error": error}}]
    deltas = [{"type": "response.output_text.delta", "delta": word} for word in WORDS]
    return [*begun, *deltas, {"type": "response.completed", "response": answer}]
