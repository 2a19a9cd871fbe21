"""Answers of ``/generate`` as a job needs them: tokens, log-probabilities, versions of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from launch.rollout.errors import RequestFailed

T = TypeVar("T")


class Span(msgspec.Struct):
    """Tokens ``[begin, end)``, which weights of one version generated."""

    version: str
    begin: int
    end: int


class Generation(msgspec.Struct):
    """An answer of ``/generate``."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    """"abort" where somebody had it ended, such as an update of the weights: it is not whole."""
    stop: str | None
    """The string that ended it, which is among the tokens and not in the text."""
    cached_tokens: int
    versions: list[Span]
    """Of all its tokens, counted from its first one."""
    read_bytes: int
    attempts: int = 1
    seconds: float = 0.0


class _Finish(msgspec.Struct):
    type: str
    message: str = ""
    matched: int | str | None = None


class SglangSpan(msgspec.Struct):
    """Of ``weight_versions``."""

    version: str
    start: int
    end: int


class _Meta(msgspec.Struct):
    finish_reason: _Finish
    cached_tokens: int = 0
    weight_version: str = ""
    weight_versions: list[SglangSpan] = []
    output_token_logprobs: list[tuple[float, int, str | None]] = []


class _Answer(msgspec.Struct):
    text: str
    output_ids: list[int]
    meta_info: _Meta


class _Reader(msgspec.Struct):
    read_bytes: dict[str, int] = {}


class _Trace(msgspec.Struct):
    readers: dict[str, _Reader] = {}


def generation_of(data: bytes, traced: str, logprobs: bool) -> Generation:
    """Of a body, its header ``x-dualpath-trace``, and whether ``logprobs`` were asked for. Raises
    :class:`RequestFailed`."""
    answer = decoded(data, _Answer)
    meta = answer.meta_info
    pairs = meta.output_token_logprobs
    if logprobs and [token for _, token, _ in pairs] != answer.output_ids:
        raise RequestFailed("the engine's log-probabilities are not those of its tokens")
    stop = meta.finish_reason.matched
    return Generation(
        text=answer.text,
        token_ids=answer.output_ids,
        logprobs=[logprob for logprob, _, _ in pairs],
        finish_reason=meta.finish_reason.type,
        stop=stop if isinstance(stop, str) else None,
        cached_tokens=meta.cached_tokens,
        versions=spans_of(meta.weight_versions, meta.weight_version, len(answer.output_ids)),
        read_bytes=read_bytes_of(traced),
    )


def read_bytes_of(traced: str) -> int:
    """Of the header ``x-dualpath-trace``: read from SSD and remote, by all agents together."""
    trace = msgspec.json.decode(traced, type=_Trace)
    return sum(sum(reader.read_bytes.values()) for reader in trace.readers.values())


def spans_of(given: Sequence[SglangSpan], version: str, tokens: int) -> list[Span]:
    """Without empty spans; one of ``version`` where SGLang gives none, as after an update without
    a version. Raises :class:`RequestFailed`."""
    spans = [Span(s.version, s.start, min(s.end, tokens)) for s in given]
    spans = [span for span in spans if span.begin < span.end]
    if not spans and tokens:
        spans = [Span(version, 0, tokens)]
    if spans and [span.begin for span in spans] != [0, *(span.end for span in spans[:-1])]:
        raise RequestFailed("the engine's versions of weights are not those of its tokens")
    if spans:
        spans[-1].end = tokens
    return spans


def decoded(data: bytes, kind: type[T]) -> T:
    """A body as one of ``kind``; raises :class:`RequestFailed`."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise RequestFailed(f"the endpoint's answer is not SGLang's: {error}") from error
