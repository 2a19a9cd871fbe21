"""What the gateway needs of an engine's routes beside their answers: the token ids that a route
makes of a prompt, those that it is to go on from in their place, a record of what was generated
(``record.py``), and, where its answers have no words for it, that a request was given up.

The gateway asks for either by a header, so that nothing here looks at other requests' tokens.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import HTTPException, Request, Response

from common.ids import (
    FIELDS_HEADER,
    GAVE_UP_STATUS,
    INPUT_IDS_HEADER,
    PROMPT_IDS_HEADER,
    RECORD_HEADER,
)
from engine.sglang.border import Use
from engine.sglang.http.record import noted, with_record

_MANAGER = "managers.tokenizer_manager.TokenizerManager."
_INPUT = "managers.io_struct.GenerateReqInput."
USES = (
    Use(_MANAGER + "_tokenize_texts", "token ids of a prompt that a template made text of"),
    Use(_INPUT + "input_ids", "the prompt, if its route tokenised it, or ours"),
    Use(_INPUT + "text", "the prompt, if not"),
    Use(_INPUT + "stream", "how an abort without a status is told"),
    Use(_INPUT + "return_logprob", "set where the answer's tokens are recorded"),
    Use(_INPUT + "rid", "set for routes whose bodies have no place for it"),
    Use(_INPUT + "extra_key", "likewise"),
    Use(_INPUT + "cache_salt", "likewise"),
    Use(_INPUT + "priority", "likewise"),
)


class Fields(msgspec.Struct, frozen=True):
    """Of SGLang's requests, which ``/v1/messages`` has no place for."""

    rid: str
    extra_key: str | None = None
    cache_salt: str | None = None
    priority: int | None = None


def around_generate(
    original: Callable[..., AsyncIterator[Any]],
    manager: Any,
    obj: Any,
    request: Request | None = None,
) -> AsyncIterator[Any]:
    """AROUND ``TokenizerManager.generate_request``, to which every generating route comes with
    what it has made of its body."""
    if request is None or _OURS.isdisjoint(request.headers.keys()):
        return original(manager, obj, request)
    if PROMPT_IDS_HEADER in request.headers:
        return _note_ids(manager, obj, request)
    return _as_asked(original, manager, obj, request)


_OURS = {PROMPT_IDS_HEADER, FIELDS_HEADER, INPUT_IDS_HEADER, RECORD_HEADER}


async def around_route(
    original: Callable[..., Awaitable[Any]],
    serving: Any,
    request: object,
    raw_request: Request,
) -> Any:
    """AROUND what serves a route: the ids that were asked for, in place of the error that came of
    it (whose text would be cut, and logged), or its answer with the record that was asked for."""
    answer = await original(serving, request, raw_request)
    if RECORD_HEADER in raw_request.headers:
        return with_record(answer, raw_request)
    ids = getattr(raw_request.state, "prompt_ids", None)
    if ids is None:
        return answer
    return Response(msgspec.json.encode({"tokens": ids}), media_type="application/json")


async def _note_ids(manager: Any, obj: Any, request: Request) -> AsyncIterator[Any]:
    ids = obj.input_ids
    if ids is None:
        ids, _ = await manager._tokenize_texts(obj.text)
    request.state.prompt_ids = list(ids)
    raise ValueError("the prompt's token ids were asked for, and nothing else")
    yield  # it is a generator, as SGLang's own


async def _as_asked(
    original: Callable[..., AsyncIterator[Any]], manager: Any, obj: Any, request: Request
) -> AsyncIterator[Any]:
    headers = request.headers
    if INPUT_IDS_HEADER in headers:  # SGLang's own conversion has read the body: it is at hand
        obj.input_ids, obj.text = (await request.json())["input_ids"], None
    if is_recorded := RECORD_HEADER in headers:
        obj.return_logprob = True
    if FIELDS_HEADER in headers:
        fields = msgspec.json.decode(headers[FIELDS_HEADER], type=Fields)
        obj.rid, obj.priority = fields.rid, fields.priority
        obj.extra_key, obj.cache_salt = fields.extra_key, fields.cache_salt
    outputs = original(manager, obj, request)
    if is_recorded:
        outputs = noted(outputs, request)
    if FIELDS_HEADER in headers:
        outputs = _with_aborts_told(outputs, obj.stream)
    async for output in outputs:
        yield output


async def _with_aborts_told(outputs: AsyncIterator[Any], stream: bool) -> AsyncIterator[Any]:
    """SGLang's ``/v1/messages`` ends an aborted answer as any other, and keeps the reason of
    a failure to itself: with a status that is nobody else's it says both."""
    try:
        async for output in outputs:
            reason = output["meta_info"].get("finish_reason") or {}
            if reason.get("type") == "abort" and _is_no_clients(reason.get("status_code")):
                if not stream:
                    raise HTTPException(GAVE_UP_STATUS, str(reason.get("message") or "aborted"))
                reason["status_code"] = HTTPStatus(GAVE_UP_STATUS)
            yield output
    except HTTPException as error:
        status = GAVE_UP_STATUS if _is_no_clients(error.status_code) else error.status_code
        raise HTTPException(status, error.detail) from error


def _is_no_clients(status: int | None) -> bool:
    """Whether it is no client's fault; None of an abort that somebody wished."""
    return status is None or status >= HTTPStatus.INTERNAL_SERVER_ERROR
