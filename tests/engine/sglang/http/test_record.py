"""The record of a turn in an engine's answers, whatever its route makes of what was generated."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel

from common.ids import INPUT_IDS_HEADER, RECORD, RECORD_HEADER
from engine.sglang.http.answers import around_generate, around_route
from engine.sglang.http.record import record_of


class Asked:
    """What a route makes of its body."""

    def __init__(self) -> None:
        self.input_ids: list[int] | None = None
        self.text: str | None = "rendered"
        self.return_logprob = False
        self.stream = False
        self.rid = None


def output(count: int, finish: dict[str, Any] | None, logprobs: bool = True) -> dict[str, Any]:
    meta: dict[str, Any] = {"finish_reason": finish, "prompt_tokens": 3, "weight_version": "v"}
    pairs = [(-0.5 * n, n, None) for n in range(count)]
    return {"output_ids": list(range(count)), "meta_info": meta | {"output_token_logprobs": pairs}}


class Manager:
    """Generates two tokens."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []

    async def generate(self, manager: Any, obj: Asked, request: Request) -> AsyncIterator[Any]:
        self.asked.append(obj)
        if obj.stream:
            yield output(1, None)
        yield output(2, {"type": "stop", "matched": 1})


class Whole(BaseModel):
    text: str = "said"


def app_of(manager: Manager) -> FastAPI:
    app = FastAPI()

    async def outputs(kind: str, request: Request) -> AsyncIterator[Any]:
        obj = Asked()
        obj.stream = kind in ("streamed", "generator")
        async for one in around_generate(manager.generate, manager, obj, request):
            yield one

    async def serve(_: Any, kind: str, request: Request) -> Any:
        made = outputs(kind, request)
        if kind in ("streamed", "generator"):

            async def chunks() -> AsyncIterator[str]:
                async for one in made:
                    yield f"data: {len(one['output_ids'])}\n\n"
                yield "data: [DONE]\n\n"

            return StreamingResponse(chunks()) if kind == "streamed" else chunks()
        await anext(made)  # as SGLang's chat, which looks at nothing behind it
        return Whole() if kind == "model" else JSONResponse({"text": "said"})

    @app.post("/{kind}")
    async def route(kind: str, request: Request) -> Any:
        await request.json()  # as FastAPI does for a route's body
        answer = await around_route(serve, None, kind, request)
        return StreamingResponse(answer) if kind == "generator" else answer

    return app


@pytest.fixture
def manager() -> Manager:
    return Manager()


@pytest.fixture
def client(manager: Manager) -> Iterator[TestClient]:
    with TestClient(app_of(manager)) as client:
        yield client


RECORDED = {INPUT_IDS_HEADER: "1", RECORD_HEADER: "1"}


@pytest.mark.parametrize("kind", ["whole", "model", "streamed", "generator"])
def test_an_answer_brings_its_tokens_to_who_asks_for_them(client, manager, kind):
    answer = client.post(f"/{kind}", json={"input_ids": [7, 8, 9]}, headers=RECORDED)
    [asked] = manager.asked
    assert (asked.input_ids, asked.text, asked.return_logprob) == ([7, 8, 9], None, True)
    if kind in ("whole", "model"):
        record = answer.json().pop(RECORD)
        assert answer.json()["text"] == "said"
    else:
        # Before the last event, at which some clients stop reading.
        first, told, *rest = answer.text.strip().split("\n\n")
        assert (first, rest) == ("data: 1", ["data: 2", "data: [DONE]"])
        name, data = told.split("\n")
        assert name == f"event: {RECORD}"
        record = json.loads(data.removeprefix("data: "))[RECORD]
    assert (record["output_ids"], record["logprobs"]) == ([0, 1], [0.0, -0.5])
    assert record["finish_reason"] == {"type": "stop", "matched": 1}
    assert (record["prompt_tokens"], record["weight_version"]) == (3, "v")


@pytest.mark.parametrize("kind", ["whole", "model", "streamed", "generator"])
def test_nobody_else_sees_a_record(client, manager, kind):
    answer = client.post(f"/{kind}", json={"input_ids": [7]})
    assert answer.status_code == 200 and RECORD not in answer.text
    [asked] = manager.asked
    assert (asked.input_ids, asked.return_logprob) == (None, False)


def test_what_failed_or_is_not_told_whole_has_no_record():
    abort = {"type": "abort", "message": "Aborted"}
    assert record_of(output(2, abort)) is not None  # somebody's wish: these tokens count
    assert record_of(output(0, abort)) is None
    assert record_of(output(2, abort | {"status_code": 500})) is None
    untold = output(2, {"type": "stop"})
    untold["output_ids"] = [0]
    assert record_of(untold) is None
