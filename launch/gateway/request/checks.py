"""What of a request must fit: the flags' bounds, and the model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Annotated

import msgspec
from msgspec import Meta

from common.json import JsonObject
from common.loads import ModelBounds
from launch.gateway.config import RequestLimits
from launch.gateway.errors import BadRequest
from launch.gateway.request.parts import (
    CHAT,
    COMPLETIONS,
    GENERATE,
    MESSAGES,
    RESPONSES,
    Part,
)

_GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag", "response_format")
_OBJECTS_WITH_GRAMMARS = ("text", "output_config")
_FREE_FORMS = (
    *("messages", "input", "system", "tools", "tool_choice", "response_format", "reasoning"),
    *("thinking", "metadata", *_OBJECTS_WITH_GRAMMARS),
)
_FREE_DICTS = ("chat_template_kwargs", "custom_params", "watermark")
_LOGPROBS = ("logprobs", "top_logprobs", "top_logprobs_num")


# ---- flags ------------------------------------------------------------------------------


def check_limits(body: JsonObject, limits: RequestLimits) -> None:
    """Raises :class:`BadRequest` for what is too much; ``body`` has the right types."""
    for fields in _with_sampling(body):
        _check_sampling(fields, limits)
    for name in (*_FREE_FORMS, *_FREE_DICTS):
        _check_depth(name, body.get(name), limits)
    tools = _list(body.get("tools"))
    for message in _list(body.get("messages")):  # SGLang takes tools from messages too
        tools = [*tools, *(_list(message.get("tools")) if isinstance(message, dict) else ())]
    _at_most("tools", len(tools), limits.tools_max)
    for name in _LOGPROBS:
        value = body.get(name)
        for count in value if isinstance(value, list) else [value]:
            if type(count) is int:
                _at_most(name, count, limits.logprobs_max)
    ids = _list(body.get("token_ids_logprob"))
    for one in ids if ids and isinstance(ids[0], list) else [ids]:
        _at_most("token_ids_logprob", len(_list(one)), limits.logprobs_max)
    # The chat template's own word for it: of another type it ends SGLang's detokenizer.
    template = body.get("chat_template_kwargs")
    spaces = template.get("spaces_between_special_tokens") if isinstance(template, dict) else None
    if not isinstance(spaces, bool | None):
        name = "chat_template_kwargs"
        raise BadRequest(f"{name}.spaces_between_special_tokens must be true or false.", name)


def _with_sampling(body: JsonObject) -> Iterator[JsonObject]:
    """The objects that may have sampling parameters."""
    yield body
    params = body.get("sampling_params")
    for one in params if isinstance(params, list) else [params]:
        if isinstance(one, dict):
            yield one


def _check_sampling(fields: JsonObject, limits: RequestLimits) -> None:
    for name in ("stop", "stop_sequences"):
        stops = fields.get(name)
        _at_most(name, len(stops) if isinstance(stops, list) else 1, limits.stop_strings_max)
    if fields.get("stop_regex") and not limits.stop_regex:
        reason = "it runs in the engine's own loop, which one that backtracks would stop"
        raise BadRequest(f"stop_regex is not allowed here (--stop-regex): {reason}.", "stop_regex")
    samples = fields.get("n")
    _at_most("n", samples if isinstance(samples, int) else 1, limits.choices_max)
    for name in _GRAMMARS:
        _check_grammar(name, fields.get(name), limits)
    for name in _OBJECTS_WITH_GRAMMARS:
        if isinstance(fields.get(name), dict):
            _check_grammar(name, fields.get(name), limits)


def _check_grammar(name: str, value: object, limits: RequestLimits) -> None:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    size_bytes = len(text.encode())
    if size_bytes > limits.grammar_bytes_max:
        raise BadRequest(
            f"{name} has {size_bytes} bytes; at most {limits.grammar_bytes_max} are allowed "
            "(--grammar-bytes-max).",
            name,
        )
    if isinstance(value, str) and name in ("json_schema", "structural_tag"):
        try:
            _check_depth(name, msgspec.json.decode(value), limits)
        except msgspec.DecodeError as error:
            raise BadRequest(f"{name} is not JSON: {error}", name) from error
        except RecursionError as error:
            raise _too_deep(name, limits) from error


def _check_depth(name: str, value: object, limits: RequestLimits) -> None:
    level: list[object] = [value]
    for _ in range(limits.json_depth_max + 1):
        inner: list[object] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, list):
                inner += one
        if not (level := inner):
            return
    raise _too_deep(name, limits)


def _too_deep(name: str, limits: RequestLimits) -> BadRequest:
    depth = limits.json_depth_max
    return BadRequest(f"{name} is nested deeper than {depth} (--json-depth-max).", name)


def _at_most(name: str, count: int, most: int) -> None:
    if count > most:
        raise BadRequest(f"{name}: {count} are too many; at most {most} are allowed.", name)


def _list(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else ()


# ---- the model --------------------------------------------------------------------------


def check_part(part: Part, bounds: ModelBounds) -> None:
    """Raises :class:`BadRequest` for what the model does not have: a token, a position."""
    body = part.body
    sampling = _sampling_of(part)
    prompt_tokens = len(part.token_ids or ())
    if part.token_ids is not None:
        _check_tokens(_PROMPT_FIELDS[part.path], part.token_ids, bounds)
        _check_length(_PROMPT_FIELDS[part.path], prompt_tokens, bounds)
    for name in ("stop_token_ids", "token_ids_logprob"):
        fields = sampling if name == "stop_token_ids" else body
        _check_tokens(name, _list(fields.get(name)), bounds)
    bias = sampling.get("logit_bias")
    if isinstance(bias, dict):
        _check_tokens("logit_bias", [int(key) for key in bias], bounds)
    for name in _LOGPROBS:
        count = body.get(name)
        if type(count) is int and count > bounds.vocabulary_tokens:
            raise BadRequest(f"{name}: there are {bounds.vocabulary_tokens} tokens.", name)
    start = body.get("logprob_start_len")
    if isinstance(start, int) and start > prompt_tokens:
        name = "logprob_start_len"
        raise BadRequest(f"{name} is {start}; the prompt has {prompt_tokens} tokens.", name)
    _check_answer_length(sampling, prompt_tokens, bounds)


_PROMPT_FIELDS = {
    CHAT: "messages",
    COMPLETIONS: "prompt",
    GENERATE: "input_ids",
    MESSAGES: "messages",
    RESPONSES: "input",
}


def _sampling_of(part: Part) -> JsonObject:
    if part.path != GENERATE:
        return part.body
    params = part.body.get("sampling_params")
    return params if isinstance(params, dict) else {}


def _check_tokens(name: str, ids: Sequence[object], bounds: ModelBounds) -> None:
    most = bounds.vocabulary_tokens
    try:
        msgspec.convert(ids, _ids_below(most))
    except msgspec.ValidationError as error:
        raise BadRequest(f"{name}: token ids must be integers in [0, {most}).", name) from error


@lru_cache(8)
def _ids_below(most: int) -> object:
    """The type of such lists: msgspec looks at 64K ids in a fifth of the time of a loop here, and
    takes no bool for an integer either."""
    return list[Annotated[int, Meta(ge=0, lt=most)]]


def check_ids(body: JsonObject, bounds: ModelBounds | None) -> None:
    """Of ``/v1/detokenize``; raises :class:`BadRequest`."""
    tokens = _list(body.get("tokens"))
    for ids in tokens if tokens and isinstance(tokens[0], list) else [tokens]:
        if bounds is not None:
            _check_tokens("tokens", _list(ids), bounds)


def _check_length(name: str, prompt_tokens: int, bounds: ModelBounds) -> None:
    if not prompt_tokens:
        raise BadRequest("The prompt is empty.", name)
    if prompt_tokens > bounds.prompt_tokens_max:
        raise BadRequest(
            f"The prompt has {prompt_tokens} tokens; at most {bounds.prompt_tokens_max} fit.", name
        )


def _check_answer_length(sampling: JsonObject, prompt_tokens: int, bounds: ModelBounds) -> None:
    """``min_tokens`` is put into 32 bits; ``max_tokens`` beyond the context SGLang refuses."""
    for name in ("min_tokens", "min_new_tokens"):
        least = sampling.get(name)
        if isinstance(least, int) and prompt_tokens + least > bounds.context_tokens:
            raise BadRequest(
                f"{name}: {least} tokens after a prompt of {prompt_tokens} exceed the context of "
                f"{bounds.context_tokens}.",
                name,
            )
