"""Requests taken apart and answers put together, without any server."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.block import BlockLayout, Namespace, block_keys
from common.json import JsonObject
from common.page_hashes import page_hashes
from launch.gateway.errors import BadRequest, EngineRefused, RequestFailed, TooManyRequests
from launch.gateway.request.merge_answers import (
    DONE,
    EngineAnswer,
    StreamMerger,
    Usage,
    add_input_logprobs,
    build_event,
    error_of,
    in_one_shape,
    merge_answers,
    parse_event,
)
from launch.gateway.request.parts import CHAT, COMPLETIONS, GENERATE, Part, split_request
from launch.gateway.request.prompt import hit_candidates

NAMESPACE = Namespace("model", "1", "float32", BlockLayout(64, 2, (8, 8)))


def usage(prompt: int, completion: int, cached: int) -> Usage:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": None,
        "reasoning_tokens": 0,
    }


def answer(index: int, prompt: int, completion: int, cached: int) -> EngineAnswer:
    choice: JsonObject = {"index": 0, "text": f"choice {index}"}
    return {"id": f"{index}-r", "choices": [choice], "usage": usage(prompt, completion, cached)}


# ---- taking apart -------------------------------------------------------------------------


@given(prompts=st.integers(1, 5), samples=st.integers(1, 4))
def test_every_prompt_gets_every_sample_in_sglangs_order(prompts: int, samples: int) -> None:
    body = {"prompt": [f"p{i}" for i in range(prompts)], "n": samples, "rid": "r"}
    parted = split_request(COMPLETIONS, body, parts_max=20)
    assert [p.text for p in parted.parts] == [
        f"p{i}" for i in range(prompts) for _ in range(samples)
    ]
    assert [p.index for p in parted.parts] == list(range(prompts * samples))
    count = prompts * samples
    assert [p.rid for p in parted.parts] == (
        [f"r_{i}" for i in range(count)] if count > 1 else ["r"]
    )
    assert {p.request_rid for p in parted.parts} == {"r"}


def test_one_prompt_stays_one_request() -> None:
    for prompt in ("text", [1, 2, 3], ["text"], [[1, 2, 3]]):
        parted = split_request(COMPLETIONS, {"prompt": prompt, "rid": "mine"}, parts_max=1)
        assert not parted.merged and parted.parts[0].rid == "mine"
    assert split_request(GENERATE, {"text": ["a"]}, parts_max=1).merged
    assert not split_request(GENERATE, {"text": "a"}, parts_max=1).merged


def test_a_batchs_own_fields_go_with_their_prompts() -> None:
    body = {
        "text": ["a", "b"],
        "rid": ["x", "y"],
        "cache_salt": ["s", ""],
        "top_logprobs_num": [1, 2],
        "token_ids_logprob": [7, 8],
        "stream": False,
    }
    first, second = split_request(GENERATE, body, parts_max=2).parts
    assert (first.rid, second.rid) == ("x", "y")
    assert (first.salt("cache_salt"), second.salt("cache_salt")) == ("s", None)
    assert (first.body["top_logprobs_num"], second.body["top_logprobs_num"]) == (1, 2)
    assert second.body["token_ids_logprob"] == [7, 8]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        {"messages": [], "n": 9},
        {"messages": [], "n": 2, "rid": ["a"]},
    ],
)
def test_what_the_cluster_cannot_serve(body: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        split_request(CHAT, body, parts_max=8)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input_ids": []},
        {"text": ""},
        {"text": ["a", ""]},
        {"text": ["a", [1]]},
        {"input_ids": [[1], 2]},
        {"text": "a", "sampling_params": [{}]},
        {"text": ["a"], "sampling_params": []},
        {"text": ["a", "b"], "sampling_params": [{}, {"n": 2}]},
        {"text": ["a", "b"], "top_logprobs_num": [1]},
    ],
)
def test_prompts_and_their_own_fields_have_one_form(body: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        split_request(GENERATE, body, parts_max=8)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 0), (64, 0), (65, 1), (129, 2)])
def test_the_last_token_is_always_computed(tokens: int, blocks: int) -> None:
    part = Part(path=GENERATE, body={}, rid="r", index=0, token_ids=[1] * tokens)
    assert len(hit_candidates(part, NAMESPACE)) == blocks


def test_under_a_draft_keys_are_over_bigrams() -> None:
    layout = msgspec.structs.replace(NAMESPACE.layout, draft_layers=1)
    namespace = msgspec.structs.replace(NAMESPACE, layout=layout)
    tokens = list(range(130))  # the last one is computed, and in no pair
    part = Part(path=GENERATE, body={}, rid="r", index=0, token_ids=tokens)
    hashes = page_hashes(tokens, 64, bigrams=True)
    assert hit_candidates(part, namespace) == block_keys(namespace.digest(), hashes)
    part.token_ids = tokens[:129]
    assert hit_candidates(part, namespace) == block_keys(namespace.digest(), hashes[:1])


def test_tokens_that_are_none_have_no_keys() -> None:
    adapted: tuple[JsonObject, ...] = ({"lora_path": "a"}, {"model": "base:adapter"})
    cases = (([-1] * 65, {}), *(([1] * 65, body) for body in adapted), (None, {}))
    for ids, body in cases:
        part = Part(path=GENERATE, body=body, rid="r", index=0, token_ids=ids)
        assert hit_candidates(part, NAMESPACE) == []


# ---- putting together ---------------------------------------------------------------------


def test_choices_are_numbered_and_prompts_counted_once() -> None:
    parts = [answer(i, 10 + i // 2, 3, 4 + i // 2) for i in range(4)]
    merged = merge_answers("r", parts, samples=2)
    assert [c["index"] for c in merged["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in merged["choices"]] == [f"choice {i}" for i in range(4)]
    expected = usage(21, 12, 9)
    assert merged["usage"] == expected and merged["id"] == "r"


def test_streams_interleave_into_one() -> None:
    merger = StreamMerger(CHAT, "r", parts=2, samples=2)
    out = b""
    for index in (1, 0):
        delta: JsonObject = {"index": 0, "delta": {"content": str(index)}}
        out += merger.take(index, build_event({"id": f"{index}-r", "choices": [delta]}))
    for index in (0, 1):
        last: EngineAnswer = {"id": f"{index}-r", "choices": [], "usage": usage(10, 2, 4)}
        out += merger.take(index, build_event(last)) + merger.take(index, DONE)
    out += merger.finish()
    *events, end = [event + b"\n\n" for event in out.split(b"\n\n")[:-1]]
    chunks = [parse_event(event) for event in events]
    assert [c["choices"][0]["index"] for c in chunks[:-1]] == [1, 0]
    assert {c["id"] for c in chunks} == {"r"}
    assert chunks[-1]["usage"] == usage(10, 4, 4)
    assert end == DONE


def test_generate_streams_name_their_index() -> None:
    merger = StreamMerger(GENERATE, "r", parts=2, samples=1)
    assert parse_event(merger.take(1, build_event({"text": "a"}))) == {"text": "a", "index": 1}
    assert merger.finish() == DONE


def test_prompt_logprobs_come_from_prefill() -> None:
    prefill: EngineAnswer = {
        "meta_info": {"input_token_logprobs": [1, 2], "input_top_logprobs": [3]}
    }
    decode: EngineAnswer = {"meta_info": {"input_token_logprobs": [], "id": "r"}}
    merged = add_input_logprobs(decode, prefill)["meta_info"]
    expected = {"input_token_logprobs": [1, 2], "input_top_logprobs": [3], "id": "r"}
    assert merged == expected


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ({"error": {"message": "x", "code": 503}}, 503),
        ({"error": "x"}, 500),
        ({"meta_info": {"finish_reason": {"type": "abort", "status_code": 400}}}, 400),
        ({"meta_info": {"finish_reason": {"type": "abort"}}}, 500),
        ({"choices": [{"finish_reason": "abort"}]}, 500),
        ({"choices": [{"finish_reason": "stop"}]}, None),
        ({"meta_info": {"finish_reason": None}}, None),
        (None, None),
    ],
)
def test_what_counts_as_a_failure(value: Any, status: int | None) -> None:
    error = error_of(value)
    assert (error[0] if error else None) == status


# ---- errors -------------------------------------------------------------------------------


def test_errors_have_openais_shape() -> None:
    error = json.loads(RequestFailed("why").body())["error"]
    assert error == {"message": "why", "type": "engine_error", "param": None, "code": 502}
    assert TooManyRequests("full").headers() == {"retry-after": "1"}
    assert RequestFailed("why").event() == b"data: " + RequestFailed("why").body() + b"\n\n"


@pytest.mark.parametrize(
    "body",
    [
        {"object": "error", "message": "too long", "type": "BadRequest", "code": 400},
        {"error": {"message": "too long", "type": "x", "retryable": False}},
        {"error": "too long"},
        {"detail": "too long"},
    ],
)
def test_an_engines_refusal_gets_the_shape_of_all_errors(body: JsonObject) -> None:
    refusal = EngineRefused(400, msgspec.json.encode(body))
    fields = {"message": "too long", "type": "invalid_request_error", "param": None, "code": 400}
    assert json.loads(refusal.body()) == {"type": "error", "error": fields}
    assert parse_event(refusal.event()) == {"type": "error", "error": fields}


def test_an_error_within_a_stream_gets_it_too() -> None:
    event = build_event({"error": {"message": "lost", "code": 503, "object": "error"}})
    fields = {"message": "lost", "type": "invalid_request_error", "param": None, "code": 503}
    assert parse_event(in_one_shape(event)) == {"type": "error", "error": fields}
    text = build_event({"text": 'an "error" in words', "meta_info": {}})
    assert in_one_shape(text) == text and in_one_shape(DONE) == DONE
