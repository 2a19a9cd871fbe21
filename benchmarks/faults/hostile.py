"""Requests that somebody sends to do harm, or by mistake."""

from __future__ import annotations

import random
from typing import Any

import aiohttp

REQUESTS = 5
TIMEOUT_S = 10.0
HUGE = 999_999_999
GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
_IDS = list(range(300, 340))
_MESSAGES = [{"role": "user", "content": "What does a harbour pilot do?"}]


def _generate(**fields: Any) -> tuple[str, Any]:
    return GENERATE, {"input_ids": _IDS, "sampling_params": {"max_new_tokens": 4}, **fields}


def _sampled(**params: Any) -> tuple[str, Any]:
    return _generate(sampling_params={"max_new_tokens": 4, **params})


def _chat(**fields: Any) -> tuple[str, Any]:
    return CHAT, {"model": "tiny", "messages": _MESSAGES, "max_tokens": 4, **fields}


def _completion(prompt: Any, **fields: Any) -> tuple[str, Any]:
    return COMPLETIONS, {"model": "tiny", "prompt": prompt, "max_tokens": 4, **fields}


KNOWN = (
    _completion([1.0, HUGE]),
    _completion(["1", HUGE]),
    _completion([[1.0, HUGE]]),
    _completion([-1]),
    _completion("hello", logprobs=100_000),
    _completion("hello", n=10_000),
    _completion("hello", logit_bias={str(HUGE): 1}),
    _chat(top_logprobs=100_000, logprobs=True),
    _chat(stop=["x"] * 100_000),
    _chat(min_tokens=1, stop_token_ids=[HUGE]),
    _chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
    _chat(tools=[{"type": "function", "function": {"name": "f" * 10_000}}]),
    _generate(input_ids=[HUGE]),
    _generate(input_ids=[]),
    _generate(input_ids=[300] * 200_000),
    _generate(return_logprob=True, top_logprobs_num=100_000),
    _generate(return_logprob=True, token_ids_logprob=[HUGE]),
    _generate(return_logprob=True, logprob_start_len=-HUGE),
    _generate(disagg_prefill_dp_rank=77),
    _generate(bootstrap_host="203.0.113.1", bootstrap_port=1, bootstrap_room=1),
    _generate(bootstrap_room=1 << 80),
    _generate(rid="a"),
    _generate(rid=["a", "b"]),
    _generate(rid="x" * 100_000),
    _generate(cache_salt="s" * 100_000),
    _generate(lora_path="nowhere"),
    _generate(input_embeds=[[0.0]]),
    _generate(session_params={"id": "nobody"}),
    _generate(image_data=["nowhere"]),
    _generate(priority=1 << 70),
    _sampled(min_new_tokens=1, stop_token_ids=[HUGE]),
    _sampled(min_new_tokens=HUGE),
    _sampled(max_new_tokens=HUGE),
    _sampled(max_new_tokens=-1),
    _sampled(temperature=-1),
    _sampled(temperature=1e-300, top_p=1e-300),
    _sampled(top_k=HUGE, min_p=2),
    _sampled(frequency_penalty=1e30),
    _sampled(logit_bias={str(HUGE): 1.0}),
    _sampled(json_schema="{" * 5000),
    _sampled(regex="(" * 5000),
    _sampled(regex="(a|aa)*" * 200 + "b"),
    _sampled(ebnf="root ::= root"),
    _sampled(ebnf="root ::= root", top_k=5),
    _sampled(custom_params={"x": "y"}),
    _sampled(n=100_000),
    ("/abort_request", {"rid": ""}),
    ("/abort_request", {"rid": 7}),
    ("/admin/policy", {"path_policy": "os:getcwd"}),
    ("/v1/tokenize", {"prompt": {"deep": "er"}}),
)
"""What has ended an engine or could, field by field."""

_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, HUGE, 1 << 63, 1 << 200, 0.5, -1e308),
    *("", "a", "\u0000", "\ud7ff" * 50, [], {}, [[]], [None], [HUGE], {"a": {"b": []}}),
)
_FIELDS = (
    *("input_ids", "text", "sampling_params", "rid", "stream", "return_logprob", "priority"),
    *("logprob_start_len", "top_logprobs_num", "token_ids_logprob", "session_params"),
    *("extra_key", "cache_salt", "lora_path", "data_parallel_rank", "bootstrap_room"),
    *("custom_logit_processor", "return_hidden_states", "background", "require_reasoning"),
)
_PARAMS = (
    *("max_new_tokens", "min_new_tokens", "stop", "stop_token_ids", "temperature", "top_p"),
    *("top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "n"),
    *("regex", "json_schema", "ebnf", "structural_tag", "logit_bias", "sampling_seed"),
    *("ignore_eos", "skip_special_tokens", "no_stop_trim", "stream_interval", "stop_regex"),
)


def draw(rng: random.Random) -> tuple[str, Any]:
    """A known one, or a request of which some fields are anything."""
    if rng.random() < 0.5:
        return rng.choice(KNOWN)
    params = {"max_new_tokens": 4} | {
        rng.choice(_PARAMS): rng.choice(_VALUES) for _ in range(rng.randint(0, 2))
    }
    fields = {rng.choice(_FIELDS): rng.choice(_VALUES) for _ in range(rng.randint(0, 2))}
    return GENERATE, {"input_ids": _IDS, "sampling_params": params, **fields}


async def attack(url: str, rng: random.Random) -> list[str]:
    """Some of them, one after the other; what was sent, and what came of it."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    said = []
    async with aiohttp.ClientSession(url, timeout=timeout) as http:
        for _ in range(REQUESTS):
            path, body = draw(rng)
            said.append(f"{path} {str(body)[:160]} -> {await _send(http, path, body)}")
    return said


async def _send(http: aiohttp.ClientSession, path: str, body: Any) -> str:
    try:
        async with http.post(path, json=body) as response:
            return f"{response.status} {(await response.text())[:80]}"
    except (aiohttp.ClientError, TimeoutError) as error:
        return type(error).__name__
