"""The three routes of conversations, as the stand-in endpoint answers them. ``CALL(name, {...})``
in what its model says is a call of a tool."""

from __future__ import annotations

import json
import re
from typing import Any

CHAT, MESSAGES, RESPONSES = ROUTES = ("/v1/chat/completions", "/v1/messages", "/v1/responses")
_CALL = re.compile(r"CALL\((\w+), (\{.*?\})\)")


def chat_of(path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """What the stand-in's template gets: text alone."""
    messages = body["input"] if path == RESPONSES else body["messages"]
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    first = body.get("system") or body.get("instructions")
    chat = [{"role": "system", "content": first}] if first else []
    if body.get("tools"):
        chat.append({"role": "tools", "content": json.dumps(body["tools"])})
    for message in messages:
        text = "".join(texts_of(message))
        if path == RESPONSES and chat and chat[-1]["role"] == role_of(message) == "assistant":
            chat[-1]["content"] += text
        else:
            chat.append({"role": role_of(message), "content": text})
    return chat


def role_of(message: dict[str, Any]) -> str:
    return message.get("role") or {"function_call_output": "tool"}.get(message["type"], "assistant")


def texts_of(message: dict[str, Any]) -> list[str]:
    content = message.get("content") or message.get("output") or ""
    blocks = [content] if isinstance(content, str) else content
    texts = [b if isinstance(b, str) else b.get("text") or b.get("content") or "" for b in blocks]
    calls = [b for b in blocks if isinstance(b, dict) and b.get("type") == "tool_use"]
    texts += [f"CALL({call['name']}, {json.dumps(call['input'])})" for call in calls]
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    if message.get("type") == "function_call":
        functions = [message]
    return texts + [f"CALL({f['name']}, {f['arguments']})" for f in functions]


def as_generate(body: dict[str, Any]) -> dict[str, Any]:
    limit = body.get("max_tokens") or body.get("max_output_tokens")
    return {"sampling_params": {"max_new_tokens": limit}, "return_logprob": True}


def record_of(answer: dict[str, Any]) -> dict[str, Any]:
    meta = answer["meta_info"]
    reason = meta["finish_reason"] | {"matched": None}
    logprobs = [value for value, _, _ in meta["output_token_logprobs"]]
    names = ("prompt_tokens", "cached_tokens", "weight_version", "weight_versions")
    told = {name: meta[name] for name in names}
    return {
        "output_ids": answer["output_ids"],
        "logprobs": logprobs,
        "finish_reason": reason,
        **told,
    }


def said_in(text: str) -> tuple[str, list[tuple[str, str]]]:
    return _CALL.sub("", text), _CALL.findall(text)


Said = tuple[str, list[tuple[str, str]]]


def whole_answer(path: str, said: Said) -> dict[str, Any]:
    text, calls = said
    if path == CHAT:
        functions = [{"name": name, "arguments": given} for name, given in calls]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        message["tool_calls"] = [
            {"id": f"call_{n}", "type": "function", "function": f} for n, f in enumerate(functions)
        ] or None
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {"id": "c", "object": "chat.completion", "model": "m", "created": 1} | {
            "choices": [choice]
        }
    if path == MESSAGES:
        content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
        for number, (name, given) in enumerate(calls):
            block = {"type": "tool_use", "id": f"call_{number}", "name": name}
            content.append(block | {"input": json.loads(given)})
        usage = {"input_tokens": 1, "output_tokens": 1}
        return {"id": "m", "type": "message", "role": "assistant", "model": "m"} | {
            "content": content,
            "stop_reason": "end_turn",
            "usage": usage,
        }
    output: list[dict[str, Any]] = []
    if text:
        part = {"type": "output_text", "text": text, "annotations": []}
        message = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
        output.append(message | {"content": [part]})
    for number, (name, given) in enumerate(calls):
        call = {"type": "function_call", "id": f"fc_{number}", "call_id": f"call_{number}"}
        output.append(call | {"name": name, "arguments": given, "status": "completed"})
    return {"id": "resp_1", "object": "response", "status": "completed", "output": output}


def events(path: str, said: Said, record: dict[str, Any] | None) -> list[bytes]:
    """Of a stream, with the record before the last one of them."""
    if path == CHAT:
        plain = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in _chunks(said)]
        plain.append(b"data: [DONE]\n\n")
    else:
        made = _blocks(said) if path == MESSAGES else _of_responses(said)
        plain = [named(event["type"], event) for event in made]
    if record is not None:
        plain.insert(-1, named("turn_record", {"type": "turn_record", "turn_record": record}))
    return plain


def named(name: str, event: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(event)}\n\n".encode()


def _chunks(said: Said) -> list[dict[str, Any]]:
    text, calls = said
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": letter} for letter in text]
    for number, (name, given) in enumerate(calls):
        call: dict[str, Any] = {"index": number, "id": f"call_{number}", "type": "function"}
        deltas.append({"tool_calls": [call | {"function": {"name": name, "arguments": ""}}]})
        for piece in (given[:3], given[3:]):
            deltas.append({"tool_calls": [{"index": number, "function": {"arguments": piece}}]})
    common = {"id": "c", "object": "chat.completion.chunk", "model": "m", "created": 1}
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    return [common | {"choices": [choice]} for choice in choices]


def _blocks(said: Said) -> list[dict[str, Any]]:
    message = whole_answer(MESSAGES, said)
    made: list[dict[str, Any]] = [
        {"type": "message_start", "message": message | {"content": [], "stop_reason": None}}
    ]
    for index, block in enumerate(message["content"]):
        if block["type"] == "text":
            empty: dict[str, Any] = {"type": "text", "text": ""}
            deltas = [{"type": "text_delta", "text": letter} for letter in block["text"]]
        else:
            empty = block | {"input": {}}
            text = json.dumps(block["input"])
            pieces = (text[:2], text[2:])
            deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
        made.append({"type": "content_block_start", "index": index, "content_block": empty})
        made += [{"type": "content_block_delta", "index": index, "delta": d} for d in deltas]
        made.append({"type": "content_block_stop", "index": index})
    ended = {"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}}
    return [*made, {"type": "message_delta", **ended}, {"type": "message_stop"}]


def _of_responses(said: Said) -> list[dict[str, Any]]:
    whole = whole_answer(RESPONSES, said)
    begun = {"type": "response.created", "response": whole | {"output": []}}
    return [begun, {"type": "response.completed", "response": whole}]
