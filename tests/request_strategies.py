"""Requests as SGLang's own models describe them, some of their fields gone astray."""

from __future__ import annotations

import dataclasses
import types
import typing
from functools import cache
from typing import Any

import msgspec
from hypothesis import strategies as st
from pydantic import BaseModel
from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    ResponsesRequest,
)
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from launch.gateway.request.parts import MESSAGES as ANTHROPICS
from launch.gateway.request.parts import RESPONSES
from tests.launch.gateway.hostile import CHAT, COMPLETIONS, GENERATE, MESSAGES

ANSWER_LENGTHS = ("max_tokens", "max_completion_tokens", "max_new_tokens")
TEXTS = st.sampled_from(
    ["", "a", "Hello there", "\x00", "é漢", "(", "[a-z]{3}", '{"type": "object"}']
)
INTEGERS = st.integers(-3, 9) | st.sampled_from([129, 32000, 2**31, 2**40, 2**63, 10**30, -(2**63)])
FLOATS = st.sampled_from([0.0, -0.0, 0.5, 1.0, 1.5, 2.0, -1.0, 1e-300, 1e-7, 1e38, 1e300, -1e300])
LEAVES = st.none() | st.booleans() | INTEGERS | FLOATS | TEXTS
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
PROMPTS: dict[str, dict[str, Any]] = {
    GENERATE: {"text": "Hello there"},
    COMPLETIONS: {"prompt": "Hello there"},
    CHAT: {"messages": MESSAGES},
    ANTHROPICS: {"model": "stub", "messages": MESSAGES},
    RESPONSES: {"input": MESSAGES},
}


MODELS: dict[str, type[BaseModel]] = {
    CHAT: ChatCompletionRequest,
    COMPLETIONS: CompletionRequest,
    ANTHROPICS: AnthropicMessagesRequest,
    RESPONSES: ResponsesRequest,
}


def fields_of(path: str) -> dict[str, Any]:
    """SGLang's fields of a route, and their types."""
    if path == GENERATE:
        hints = typing.get_type_hints(GenerateReqInput)
        return {field.name: hints[field.name] for field in dataclasses.fields(GenerateReqInput)}
    model = MODELS[path]
    return {name: field.annotation for name, field in model.model_fields.items()}


def sampling_fields() -> dict[str, Any]:
    """Of ``sampling_params``."""
    hints = typing.get_type_hints(SamplingParams)
    return {name: hints[name] for name in SamplingParams.__struct_fields__}


def _values(kind: Any) -> st.SearchStrategy[Any]:
    """JSON of a type, with values that its range does not have."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(_values, arguments))
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin in (list, set, tuple):
        return st.lists(_values(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(TEXTS | st.sampled_from(["1", "2", "5"]), JSON, max_size=3)
    if origin is typing.Annotated:
        return _values(arguments[0])
    simple = {bool: st.booleans(), int: INTEGERS, float: FLOATS, str: TEXTS}
    if kind in simple:
        return simple[kind]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return _objects(kind)
    return JSON


@cache
def _objects(model: type[BaseModel]) -> st.SearchStrategy[Any]:
    """Models name themselves: what is in them is looked at when it is drawn."""

    def fields() -> st.SearchStrategy[Any]:
        inner = {name: _values(field.annotation) for name, field in model.model_fields.items()}
        return st.fixed_dictionaries({}, optional=inner)

    return st.deferred(fields)


def _astray(fields: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A few of these fields, most of their type, some of any other."""
    strategies = {
        name: st.integers(-1, 8) | st.none() | TEXTS | FLOATS
        if name in ANSWER_LENGTHS  # what is taken must not take long
        else _values(kind) | JSON
        for name, kind in fields.items()
    }
    names = st.lists(st.sampled_from(sorted(strategies)), min_size=1, max_size=4, unique=True)
    return names.flatmap(
        lambda chosen: st.fixed_dictionaries({name: strategies[name] for name in chosen})
    )


def _generate() -> st.SearchStrategy[dict[str, Any]]:
    sampling = st.just({}) | _astray(sampling_fields())
    params = st.builds(lambda fields: {"max_new_tokens": 4, **fields}, sampling)
    fields = st.just({}) | _astray(fields_of(GENERATE))
    return st.builds(
        lambda own, params: {**PROMPTS[GENERATE], "sampling_params": params, **own}, fields, params
    )


def _openai(path: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda fields: {**PROMPTS[path], "max_tokens": 4, **fields}, _astray(fields_of(path))
    )


REQUESTS: st.SearchStrategy[tuple[str, dict[str, Any]]] = st.one_of(
    st.tuples(st.just(GENERATE), _generate()),
    st.tuples(st.just(COMPLETIONS), _openai(COMPLETIONS)),
    st.tuples(st.just(CHAT), _openai(CHAT)),
    st.tuples(st.just(ANTHROPICS), _openai(ANTHROPICS)),
    st.tuples(st.just(RESPONSES), _openai(RESPONSES)),
)


def encoded(body: dict[str, Any]) -> bytes:
    return msgspec.json.encode(body)
