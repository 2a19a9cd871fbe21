"""What the gateway lets through, and what SGLang's scheduler does with it, side by side."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from pydantic import ValidationError
from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    ResponsesRequest,
)
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from common.loads import ModelBounds
from engine.sglang import startup
from launch.gateway.config import LOGPROBS_MAX, RequestLimits
from launch.gateway.errors import BadRequest
from launch.gateway.request.checks import check_limits, check_part
from launch.gateway.request.parts import GENERATING, MESSAGES, RESPONSES, Part, split_request
from launch.gateway.request.schema import IGNORED, REFUSED, TABLES, decode_body
from tests.launch.gateway.hostile import CHAT, GENERATE
from tests.launch.gateway.stubs import running_cluster
from tests.request_strategies import REQUESTS, encoded, fields_of

BOUNDS = ModelBounds(vocabulary_tokens=2000, context_tokens=32768, prompt_tokens_max=20000)


@pytest.mark.parametrize("path", GENERATING)
def test_every_field_of_sglang_is_known(path: str) -> None:
    known = TABLES[path].keys() | REFUSED.keys() | IGNORED
    assert fields_of(path).keys() - known == set()


def test_a_decode_engine_takes_no_prompt_that_it_would_never_admit() -> None:
    model = SimpleNamespace(vocab_size=2000, context_len=32768)
    scheduler = SimpleNamespace(
        model_config=model,
        max_req_input_len=20474,
        max_total_num_tokens=20480,
        page_size=64,
        disagg_decode_prealloc_queue=SimpleNamespace(num_reserved_decode_tokens=500),
    )
    assert startup._bounds(scheduler) == ModelBounds(2000, 32768, 19968)
    scheduler.disagg_decode_prealloc_queue = None
    assert startup._bounds(scheduler) == ModelBounds(2000, 32768, 20474)


def let_through(path: str, body: dict[str, Any]) -> list[Part]:
    fields = decode_body(path, encoded(body))
    check_limits(fields, RequestLimits())
    parts = split_request(path, fields, parts_max=256).parts
    for part in parts:
        if part.token_ids is None:
            part.token_ids = [7, 8, 9]
        check_part(part, BOUNDS)
    return parts


def sampling_of(path: str, body: dict[str, Any]) -> tuple[GenerateReqInput, dict[str, Any]]:
    """As SGLang's HTTP process makes them; raises what makes it answer 400."""
    body = json.loads(encoded(body))
    if path == GENERATE:
        request = GenerateReqInput(**body)
    elif path == MESSAGES:
        said = AnthropicMessagesRequest.model_validate(body)
        serving: Any = SimpleNamespace(_merge_inline_system=True)
        chat = AnthropicServing._convert_to_chat_completion_request(serving, said)
        params = chat.to_sampling_params([], {}, None)
        request = GenerateReqInput(input_ids=[7, 8, 9], sampling_params=params)
    elif path == RESPONSES:
        wanted = ResponsesRequest.model_validate(body)
        params = wanted.to_sampling_params(100, {})
        request = GenerateReqInput(input_ids=[7, 8, 9], sampling_params=params)
        request.top_logprobs_num = wanted.top_logprobs
    elif path == CHAT:
        chat = ChatCompletionRequest.model_validate(body)
        params = chat.to_sampling_params([], {}, None)
        request = GenerateReqInput(input_ids=chat.input_ids, sampling_params=params)
        request.top_logprobs_num = chat.top_logprobs
    else:
        asked = CompletionRequest.model_validate(body)
        params = OpenAIServingCompletion._build_sampling_params(None, asked)
        request = GenerateReqInput(input_ids=asked.prompt, sampling_params=params)
        request.top_logprobs_num = asked.logprobs
    request.normalize_batch_and_arguments()
    assert request.is_single
    return request, request.sampling_params


def check_scheduler(request: GenerateReqInput, params: dict[str, Any]) -> None:
    """What the scheduler relies on without looking."""
    sampling = SamplingParams(**params)
    sampling.verify(BOUNDS.vocabulary_tokens)
    for value in (sampling.top_k, sampling.min_new_tokens):
        torch.tensor([value], dtype=torch.int32)
    for value in (sampling.temperature, sampling.repetition_penalty):
        assert 0 < torch.tensor([value], dtype=torch.float32).item() < float("inf")
    bias = sampling.logit_bias or {}
    assert torch.tensor(list(bias.values()), dtype=torch.float32).isfinite().all()
    ids = [*(sampling.stop_token_ids or ()), *map(int, bias), *(request.token_ids_logprob or ())]
    ids += request.input_ids if isinstance(request.input_ids, list) else []
    assert all(type(token) is int and 0 <= token < BOUNDS.vocabulary_tokens for token in ids)
    assert 0 <= (request.top_logprobs_num or 0) <= LOGPROBS_MAX
    assert type(sampling.max_new_tokens) in (int, type(None))
    assert isinstance(sampling.spaces_between_special_tokens, bool)
    assert type(sampling.skip_special_tokens) is bool and type(sampling.ignore_eos) is bool
    assert not sampling.stop_regex


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=REQUESTS)
def test_what_is_let_through_harms_no_scheduler(asked: tuple[str, dict[str, Any]]) -> None:
    path, body = asked
    try:
        parts = let_through(path, body)
    except BadRequest as refusal:
        assert str(refusal)
        return
    for part in parts[:2]:
        try:
            request, params = sampling_of(path, part.engine_body())
            SamplingParams(**params).verify(BOUNDS.vocabulary_tokens)
        except (ValueError, ValidationError):
            continue  # SGLang itself refuses it, before its scheduler
        check_scheduler(request, params)


def test_no_request_makes_the_gateway_fail() -> None:
    """None of the gateway's answers is a 5xx, whatever it is asked."""

    async def ask(cluster: Any, path: str, data: bytes) -> None:
        headers = {"content-type": "application/json"}
        async with cluster.http.post(path, data=data, headers=headers) as answer:
            text = await answer.text()
            # 422: messages of which an engine makes no prompt, such as an empty one.
            assert answer.status in (200, 400, 422), (answer.status, data, text)
            if answer.status != 200:
                assert json.loads(text)["error"].keys() == {"message", "type", "param", "code"}

    with asyncio.Runner() as runner:
        running = running_cluster()
        cluster = runner.run(running.__aenter__())

        @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
        @given(asked=REQUESTS)
        def check(asked: tuple[str, dict[str, Any]]) -> None:
            path, body = asked
            runner.run(ask(cluster, path, encoded(body)))

        try:
            check()
        finally:
            runner.run(running.__aexit__(None, None, None))
