"""A record of what was generated, in the answer itself: token ids, log-probabilities, versions of
the weights. Routes that speak of text alone have no place for them, and text that is made tokens
again may be others.

An answer gets one more field, a stream one more event, before the last of those that follow its
last token: whoever has read the stream to its end has the record.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from common.ids import RECORD
from common.json import JsonObject


async def noted(outputs: AsyncIterator[Any], request: Request) -> AsyncIterator[Any]:
    """``outputs``, of which the last is noted before its route makes an answer of it."""
    async for output in outputs:
        if output["meta_info"].get("finish_reason"):
            request.state.record = record_of(output)
        yield output


def record_of(output: dict[str, Any]) -> JsonObject | None:
    """None of an answer that was given up, or whose tokens SGLang has not all told."""
    meta = output["meta_info"]
    reason, ids = meta["finish_reason"], list(output["output_ids"])
    pairs = meta.get("output_token_logprobs") or []
    is_failed = reason["type"] == "abort" and (reason.get("status_code") or not ids)
    if is_failed or [token for _, token, *_ in pairs] != ids:
        return None
    return {
        "output_ids": ids,
        "logprobs": [logprob for logprob, *_ in pairs],
        "finish_reason": {name: reason.get(name) for name in ("type", "matched")},
        "prompt_tokens": meta["prompt_tokens"],
        "cached_tokens": meta.get("cached_tokens", 0),
        "weight_version": meta.get("weight_version") or "",
        "weight_versions": meta.get("weight_versions") or [],
    }


def with_record(answer: object, request: Request) -> object:
    """Of a route that has answered whole, or that begins to."""
    if isinstance(answer, StreamingResponse):
        answer.body_iterator = _with_event(answer.body_iterator, request)
        return answer
    if isinstance(answer, AsyncIterator):
        return _with_event(answer, request)
    record = getattr(request.state, "record", None)
    if record is None:
        return answer
    if isinstance(answer, Response):
        data = bytes(answer.body)
    else:
        assert isinstance(answer, BaseModel)
        data = answer.model_dump_json(by_alias=True).encode()
    fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    fields[RECORD] = msgspec.Raw(msgspec.json.encode(record))
    return Response(msgspec.json.encode(fields), media_type="application/json")


async def _with_event(chunks: AsyncIterable[Any], request: Request) -> AsyncIterator[Any]:
    has_told = False
    async for chunk in chunks:
        record = getattr(request.state, "record", None)
        if record is not None and not has_told:
            has_told = True
            data = msgspec.json.encode({"type": RECORD, RECORD: record}).decode()
            yield f"event: {RECORD}\ndata: {data}\n\n"
        yield chunk
