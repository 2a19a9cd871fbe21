"""What a request may hold: SGLang's fields, their types, and the bounds that SGLang relies on.

An engine's scheduler ends itself on any exception, so what it gets must be of the right kind:
a field that is not in a table here never reaches an engine. Types are strict, since what SGLang
coerces (``1.0``, ``"7"``) it has not checked. SGLang still judges all the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Raw

from common.json import JsonObject
from launch.gateway.errors import BadRequest
from launch.gateway.request.parts import CHAT, COMPLETIONS, GENERATE, MESSAGES, RESPONSES

TOKENIZE = "/v1/tokenize"
DETOKENIZE = "/v1/detokenize"
COUNT_TOKENS = "/v1/messages/count_tokens"

# ---- types ------------------------------------------------------------------------------

_Flag = bool | None
_Text = str | None
_Texts = str | list[str] | None
_Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Tokens = Annotated[int, Meta(ge=0, le=2**31 - 1)] | None
_Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None
_TopK = Annotated[int, Meta(ge=-1, le=1 << 30)] | None
_Temperature = Annotated[float, Meta(ge=0, le=1e6)] | None
_Share = Annotated[float, Meta(ge=0, le=1)] | None
_Penalty = Annotated[float, Meta(ge=-2, le=2)] | None
# Smaller ones make logits infinite in the sampler's 32 bits.
_Repetition = Annotated[float, Meta(ge=0.01, le=2)] | None
_TokenKey = Annotated[str, Meta(pattern="^[0-9]{1,9}$")]
_LogitBias = dict[_TokenKey, Annotated[float, Meta(ge=-1e9, le=1e9)]] | None
_Rid = Annotated[str, Meta(max_length=256)]
_Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None
_Start = Annotated[int, Meta(ge=-1, le=2**31 - 1)]


class StreamOptions(msgspec.Struct, omit_defaults=True):
    """OpenAI's, and SGLang's."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


# ---- tables: field -> type --------------------------------------------------------------

_SAMPLING: dict[str, object] = {
    "frequency_penalty": _Penalty,
    "presence_penalty": _Penalty,
    "repetition_penalty": _Repetition,
    "temperature": _Temperature,
    "top_p": _Share,
    "top_k": _TopK,
    "min_p": _Share,
    "n": Annotated[int, Meta(ge=1)] | None,
    "stop": _Texts,
    "stop_token_ids": list[int] | None,
    "stop_regex": _Texts,
    "no_stop_trim": _Flag,
    "ignore_eos": _Flag,
    "skip_special_tokens": _Flag,
    "logit_bias": _LogitBias,
    "regex": _Text,
    "ebnf": _Text,
    "custom_params": JsonObject | None,
    "watermark": JsonObject | None,
}
_NATIVE_SAMPLING = {
    **_SAMPLING,
    "max_new_tokens": _Tokens,
    "min_new_tokens": _Tokens,
    "sampling_seed": _Seed,
    "stream_interval": Annotated[int, Meta(ge=1, le=2**31 - 1)] | None,
    "spaces_between_special_tokens": _Flag,
    "json_schema": _Text,
    "structural_tag": _Text,
    "beam_width": Literal[1] | None,  # SGLang has no beam search with P/D
}
_OPENAI = {
    **_SAMPLING,
    "model": str,
    "seed": _Seed,
    "stream": _Flag,
    "stream_options": StreamOptions | None,
    "max_tokens": _Tokens,
    "min_tokens": _Tokens,
    "user": _Text,
    "response_format": JsonObject | None,
    "return_hidden_states": bool | Literal["last"] | None,
    "return_cached_tokens_details": _Flag,
    "return_spec_tokens_details": _Flag,
    "return_token_ids": _Flag,
    "lora_path": _Text,
    "session_id": _Text,
    "custom_logit_processor": _Text,
    "rid": _Rid | list[_Rid] | None,
    "extra_key": _Text,
    "cache_salt": _Text,
    "priority": _Priority,
}
_CHAT = {
    **_OPENAI,
    "messages": list[JsonObject],
    "input_ids": list[int] | None,
    "max_completion_tokens": _Tokens,
    "logprobs": _Flag,
    "top_logprobs": _Tokens,
    "tools": list[JsonObject] | None,
    "tool_choice": str | JsonObject | None,
    "parallel_tool_calls": _Flag,
    "reasoning": JsonObject | None,
    "reasoning_effort": str | float | None,
    "separate_reasoning": _Flag,
    "stream_reasoning": _Flag,
    "thinking": object,
    "task": _Text,
    "continue_final_message": _Flag,
    "chat_template_kwargs": JsonObject | None,
    "return_prompt_token_ids": _Flag,
    "return_meta_info": _Flag,
    "return_input_ids_in_sglext": _Flag,
    "return_output_ids_in_sglext": _Flag,
    "return_sampling_mask": _Flag,
    "sampling_logprobs_mode": Literal["selected", "support"] | None,
    "return_flat_raw_output_top_logprobs": _Flag,
    "return_flat_raw_top_logprobs_b64": _Flag,
}
_COMPLETIONS = {
    **_OPENAI,
    "prompt": str | list[str | int | list[int]],
    "suffix": _Text,
    "best_of": _Tokens,
    "echo": _Flag,
    "logprobs": _Tokens,
    "json_schema": _Text,
}
_GENERATE = {
    "text": _Texts,
    "input_ids": list[int | list[int]] | None,
    "sampling_params": Raw,
    "rid": _Rid | list[_Rid] | None,
    "stream": _Flag,
    "user": _Text,
    "session_id": _Text,
    "watermark": JsonObject | None,
    "return_logprob": bool | list[bool] | None,
    "logprob_start_len": _Start | list[_Start] | None,
    "top_logprobs_num": _Count | list[_Count] | None,
    "token_ids_logprob": list[int | list[int]] | None,
    "return_text_in_logprobs": _Flag,
    "return_flat_raw_top_logprobs": _Flag,
    "return_flat_raw_output_top_logprobs": _Flag,
    "return_flat_raw_top_logprobs_b64": _Flag,
    "return_sampling_mask": bool | list[bool] | None,
    "sampling_logprobs_mode": Literal["selected", "support"] | None,
    "return_hidden_states": bool | Literal["last"] | None,
    "return_prompt_token_ids": _Flag,
    "lora_path": str | list[str | None] | None,
    "custom_logit_processor": str | list[str | None] | None,
    "routing_key": _Text,
    "conversation_id": _Text,
    "require_reasoning": _Flag,
    "max_thinking_tokens": _Tokens,
    "priority": _Priority,
    "extra_key": _Texts,
    "cache_salt": _Texts,
    "no_logs": _Flag,
    "log_metrics": _Flag,
}
_COUNT_TOKENS = {
    "model": str,
    "messages": list[JsonObject],
    "system": str | list[JsonObject] | None,
    "thinking": JsonObject | None,
    "tool_choice": JsonObject | None,
    "tools": list[JsonObject] | None,
    "output_config": JsonObject | None,
    "betas": list[str] | None,
}
_MESSAGES = {
    **_COUNT_TOKENS,
    "max_tokens": Annotated[int, Meta(ge=1, le=2**31 - 1)],
    "metadata": JsonObject | None,
    "stop_sequences": list[str] | None,
    "stream": _Flag,
    "temperature": _Temperature,
    "top_k": _TopK,
    "top_p": _Share,
    # SGLang's for all other routes.
    "rid": _Rid | None,
    "extra_key": _Text,
    "cache_salt": _Text,
    "priority": _Priority,
}
_RESPONSES = {
    "model": _Text,
    "input": str | list[JsonObject],
    "instructions": _Text,
    "include": list[str] | None,
    "max_output_tokens": _Tokens,
    "max_tool_calls": _Tokens,
    "metadata": JsonObject | None,
    "parallel_tool_calls": _Flag,
    "previous_response_id": _Text,
    "reasoning": JsonObject | None,
    "service_tier": _Text,
    "store": _Flag,
    "stream": _Flag,
    "text": JsonObject | None,
    "tool_choice": str | JsonObject | None,
    "tools": list[JsonObject],
    "top_logprobs": _Tokens,
    "truncation": _Text,
    "user": _Text,
    "chat_template_kwargs": JsonObject | None,
    "request_id": _Rid,
    "session_id": _Text,
    "priority": _Priority,
    "extra_key": _Text,
    "cache_salt": _Text,
    "temperature": _Temperature,
    "top_p": _Share,
    "top_k": _TopK,
    "min_p": _Share,
    "frequency_penalty": _Penalty,
    "presence_penalty": _Penalty,
    "repetition_penalty": _Repetition,
    "stop": _Texts,
}
_TOKENIZE = {
    **{name: kind for name, kind in _CHAT.items() if name not in ("stream", "stream_options")},
    "messages": list[JsonObject] | None,
    "prompt": _Texts,
    "add_special_tokens": _Flag,
    "add_generation_prompt": _Flag,
}
_DETOKENIZE = {
    "model": str,
    "tokens": list[int | list[int]],
    "skip_special_tokens": _Flag,
}
_PARSE_CALLS = {"text": str, "tools": list[JsonObject], "tool_call_parser": _Text}
_SEPARATE = {"text": str, "reasoning_parser": str, "return_blocks": bool}
OWN: Mapping[str, object] = {"no_load": _Flag, "no_store": _Flag}
"""Fields of this gateway's own, which engines do not see."""
_RECORDED: Mapping[str, object] = {
    **OWN,
    "input_ids": list[int] | None,
    "return_turn_record": _Flag,
}
"""Of conversations, whose next turns go on from the very tokens of those before."""
TABLES: Mapping[str, Mapping[str, object]] = {
    CHAT: {**_CHAT, **_RECORDED},
    COMPLETIONS: {**_COMPLETIONS, **OWN},
    GENERATE: {**_GENERATE, **OWN},
    MESSAGES: {**_MESSAGES, **_RECORDED},
    RESPONSES: {**_RESPONSES, **_RECORDED},
    COUNT_TOKENS: _COUNT_TOKENS,
    TOKENIZE: _TOKENIZE,
    DETOKENIZE: _DETOKENIZE,
    "/parse_function_call": _PARSE_CALLS,
    "/separate_reasoning": _SEPARATE,
}

_INTERNAL = "is set by the gateway alone: leave it out"
_MEDIA = "is not supported: this cluster serves text only"
_SESSIONS = "is not supported: send the whole conversation, its KV is found again by its tokens"
_SCORING = "is not supported: this cluster generates only"
_EXPERTS = "is not supported: a prompt's are known to its prefill engine alone"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("bootstrap_host", "bootstrap_port", "bootstrap_room"), _INTERNAL),
    **dict.fromkeys(("bootstrap_pair_key", "decode_tp_size", "disagg_prefill_dp_rank"), _INTERNAL),
    **dict.fromkeys(("data_parallel_rank", "routed_dp_rank", "http_worker_ipc"), _INTERNAL),
    **dict.fromkeys(("lora_id", "kv_hints", "received_time", "background"), _INTERNAL),
    **dict.fromkeys(("external_trace_header", "need_wait_for_mm_inputs"), _INTERNAL),
    **dict.fromkeys(("num_items_assigned", "encoder_urls", "return_bytes"), _INTERNAL),
    "custom_labels": "is the operator's: leave it out",
    **dict.fromkeys(("image_data", "audio_data", "video_data", "modalities"), _MEDIA),
    **dict.fromkeys(("input_embeds", "positional_embed_overrides"), _MEDIA),
    "session_params": _SESSIONS,
    **dict.fromkeys(("multi_item_delimiter_indices", "token_indices_to_pool"), _SCORING),
    "return_entropy": _SCORING,
    **dict.fromkeys(("return_routed_experts", "routed_experts_start_len"), _EXPERTS),
    "return_indexer_topk": _EXPERTS,
}
"""SGLang's fields that a client may not set, and what it is told; without a value they pass."""
IGNORED = frozenset(
    {
        *("mm_hashes", "mm_content_hashes", "mm_processor_kwargs", "images_config"),
        *("use_audio_in_video", "video_config", "max_dynamic_patch", "min_dynamic_patch"),
        *("image_max_dynamic_patch", "video_max_dynamic_patch"),
    }
)
"""SGLang's fields about media: of no effect on text, so they are left out as unknown ones are."""
_NOTHING = frozenset({b"null", b"false", b"0", b'""', b"[]", b"{}"})


def decode_body(path: str, data: bytes) -> JsonObject:
    """The fields of a request that an engine may see; raises ``BadRequest``."""
    try:
        given = _raw_object(data)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BadRequest(f"The body is not a JSON object: {error}") from error
    for name in given.keys() & REFUSED.keys():
        if bytes(given[name]) not in _NOTHING:
            raise BadRequest(f"{name} {REFUSED[name]}.", name)
    body = _decode_fields(TABLES[path], given)
    if "sampling_params" in body:
        body["sampling_params"] = _sampling_params(given["sampling_params"])
    return body


def _sampling_params(raw: Raw) -> object:
    """One object, or a list with one for each prompt."""
    name, text = "sampling_params", bytes(raw)
    if text == b"null":
        return None
    several = text.startswith(b"[")
    try:
        given = msgspec.json.decode(raw, type=list[Raw]) if several else [raw]
        objects = [_raw_object(one) for one in given]
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BadRequest(f"{name} must be an object, or a list of them: {error}", name) from error
    for one in objects:
        for unknown in one.keys() - _NATIVE_SAMPLING.keys():
            raise BadRequest(f"{name} has no field {unknown[:100]!r}.", name)
    params = [_decode_fields(_NATIVE_SAMPLING, one) for one in objects]
    return params if several else params[0]


def _raw_object(data: bytes | Raw) -> dict[str, Raw]:
    try:
        return msgspec.json.decode(data, type=dict[str, Raw])
    except RecursionError as error:
        raise BadRequest("The body is nested too deep.") from error


def _decode_fields(table: Mapping[str, object], given: Mapping[str, Raw]) -> JsonObject:
    body: JsonObject = {}
    for name, raw in given.items():
        if name not in table:
            continue
        try:
            body[name] = _decoder(table[name]).decode(raw)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise BadRequest(f"{name} is not as it must be: {error}", name) from error
        except RecursionError as error:
            raise BadRequest(f"{name} is nested too deep.", name) from error
    return body


@cache
def _decoder(kind: object) -> msgspec.json.Decoder[object]:
    return msgspec.json.Decoder(kind)
