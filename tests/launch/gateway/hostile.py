"""Requests that would end an engine, or lead its scheduler astray, and the field at fault."""

from __future__ import annotations

from typing import Any

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
GENERATE = "/generate"
TOO_LARGE = 2**30

MESSAGES = [{"role": "user", "content": "Hello there"}]


def _deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": MESSAGES, "max_tokens": 4, **fields}


def _complete(**fields: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"prompt": "Hello there", "max_tokens": 4, **fields}


def _generate(sampling: dict[str, Any] | None = None, **fields: Any) -> tuple[str, dict[str, Any]]:
    params = {"max_new_tokens": 4, **(sampling or {})}
    return GENERATE, {"text": "Hello there", "sampling_params": params, **fields}


def _ids(ids: Any) -> tuple[str, dict[str, Any]]:
    return GENERATE, {"input_ids": ids, "sampling_params": {"max_new_tokens": 4}}


REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    (field, path, body)
    for field, (path, body) in [
        # Token ids, of every shape that SGLang takes or coerces.
        *(
            ("prompt", _complete(prompt=prompt))
            for prompt in (
                [1.0, TOO_LARGE],
                ["1", TOO_LARGE],
                [[1.0, TOO_LARGE]],
                [1, TOO_LARGE],
                [[1], [TOO_LARGE]],
                [1, -1],
                [True],
                [],
                "",
                [""],
                ["a", [1]],
                {"a": 1},
                None,
            )
        ),
        *(("input_ids", _ids(ids)) for ids in ([TOO_LARGE], [[1], [TOO_LARGE]], [1, "2"], [])),
        ("input_ids", _ids([1, 2.0])),
        ("messages", _chat(input_ids=[TOO_LARGE])),
        ("input_ids", _chat(input_ids=[[1]])),
        ("stop_token_ids", _complete(min_tokens=1, stop_token_ids=[TOO_LARGE])),
        ("stop_token_ids", _chat(min_tokens=1, stop_token_ids=[-1])),
        ("stop_token_ids", _generate({"min_new_tokens": 1, "stop_token_ids": [TOO_LARGE]})),
        ("stop_token_ids", _complete(stop_token_ids=["7"])),
        ("logit_bias", _chat(logit_bias={str(TOO_LARGE): 1})),
        ("logit_bias", _generate({"logit_bias": {"-1": 1}})),
        ("logit_bias", _complete(logit_bias={"1": 1e300})),
        ("logit_bias", _complete(logit_bias={"1": "1"})),
        # Counts.
        ("top_logprobs", _chat(logprobs=True, top_logprobs=100000)),
        ("top_logprobs", _chat(logprobs=True, top_logprobs=129)),
        ("top_logprobs", _chat(logprobs=True, top_logprobs=-1)),
        ("logprobs", _complete(logprobs=100000)),
        ("logprobs", _complete(logprobs=True)),
        ("top_logprobs_num", _generate(return_logprob=True, top_logprobs_num=100000)),
        ("top_logprobs_num", _generate(return_logprob=True, top_logprobs_num=1.5)),
        ("token_ids_logprob", _generate(return_logprob=True, token_ids_logprob=[TOO_LARGE])),
        ("token_ids_logprob", _generate(return_logprob=True, token_ids_logprob=[1] * 129)),
        ("logprob_start_len", _generate(return_logprob=True, logprob_start_len=-5)),
        ("logprob_start_len", _generate(return_logprob=True, logprob_start_len=99999)),
        ("min_tokens", _complete(min_tokens=2**31 - 1, max_tokens=2**31 - 1)),
        ("min_tokens", _chat(min_tokens=2**40)),
        ("min_new_tokens", _generate({"min_new_tokens": 10**6, "max_new_tokens": None})),
        ("max_new_tokens", _generate({"max_new_tokens": 1.5})),
        ("max_new_tokens", _generate({"max_new_tokens": -1})),
        ("n", _complete(n=1000)),
        ("n", _chat(n=0)),
        ("n", _generate({"n": "2"})),
        ("stop", _complete(stop=["x"] * 33)),
        ("tools", _chat(tools=[{"type": "function", "function": {"name": "f"}}] * 129)),
        # What the sampler puts into 32 bits.
        ("top_k", _complete(top_k=2**40)),
        ("top_k", _generate({"top_k": 2**31})),
        ("temperature", _chat(temperature=1e300)),
        ("temperature", _generate({"temperature": "0"})),
        ("repetition_penalty", _complete(repetition_penalty=1e-40)),
        ("seed", _chat(seed=2**80)),
        ("sampling_seed", _generate({"sampling_seed": "x"})),
        ("stream_interval", _generate({"stream_interval": 0})),
        ("skip_special_tokens", _generate({"skip_special_tokens": "no"})),
        (
            "chat_template_kwargs",
            _chat(chat_template_kwargs={"spaces_between_special_tokens": [1]}),
        ),
        ("sampling_params", _generate({"is_normalized": True})),
        ("sampling_params", _generate({"stop_strs": "x"})),
        ("sampling_params", (GENERATE, {"text": "a", "sampling_params": [{}]})),
        ("sampling_params", (GENERATE, {"text": "a", "sampling_params": 5})),
        ("beam_width", _generate({"beam_width": 4, "n": 2})),
        ("stop_regex", _complete(stop_regex="(a+)+$")),
        # Grammars.
        ("regex", _complete(regex="a" * 40000)),
        ("json_schema", _generate({"json_schema": '{"items":' * 1000 + "{}" + "}" * 1000})),
        ("json_schema", _complete(json_schema="{")),
        ("response_format", _chat(response_format={"type": "json_schema", "schema": _deep(100)})),
        ("custom_params", _complete(custom_params={"a": _deep(100)})),
        ("messages", _chat(messages=[{"role": "user", "content": _deep(100)}])),
        # What is nobody's but the gateway's.
        ("bootstrap_room", _complete(bootstrap_room=7)),
        ("bootstrap_host", _chat(bootstrap_host="10.0.0.1")),
        ("disagg_prefill_dp_rank", _chat(disagg_prefill_dp_rank=77)),
        ("data_parallel_rank", _generate(data_parallel_rank=1)),
        ("routed_dp_rank", _complete(routed_dp_rank=-1)),
        ("http_worker_ipc", _generate(http_worker_ipc="ipc:///tmp/x")),
        ("lora_id", _generate(lora_id="x")),
        ("kv_hints", _generate(kv_hints={"version": 1})),
        ("custom_labels", _generate(custom_labels={"a b": "c"})),
        ("session_params", _generate(session_params={"id": "x"})),
        ("input_embeds", (GENERATE, {"input_embeds": [[0.5]]})),
        ("image_data", _generate(image_data="http://169.254.169.254/")),
        ("token_indices_to_pool", _generate(token_indices_to_pool=[9])),
        ("multi_item_delimiter_indices", _generate(multi_item_delimiter_indices=[99])),
        ("return_routed_experts", _generate(return_routed_experts=True)),
        ("rid", _complete(rid={"a": 1})),
        ("rid", _generate(rid="x" * 300)),
        ("rid", _generate(rid=["a", "b"])),
        ("cache_salt", _chat(cache_salt=7)),
        ("priority", _chat(priority=2**70)),
        ("stream", _chat(stream="yes")),
    ]
]
