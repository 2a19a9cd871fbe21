"""The columns of a sample, on its way (journal) and at its end (Parquet, docs/rollout.md)."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from common.json import JsonObject
from launch.rollout.answers import Span
from launch.rollout.input.rows import SAMPLING_COLUMNS, Sampling

ABORT = "abort"
"""SGLang's reason of an answer that is not whole."""


class Segment(msgspec.Struct):
    """What one request generated of a turn: tokens ``[begin, end)`` of the sample. There are more
    than one where the weights were updated meanwhile, or a job went on with an unfinished sample:
    each is sent all that was there before it."""

    begin: int
    end: int
    cached_tokens: int
    finish_reason: str


class Turn(msgspec.Struct):
    """One answer of an episode. ``[begin, end)`` of the sample's token ids are what was
    generated."""

    begin: int
    end: int
    prompt_tokens: int
    cached_tokens: int
    finish_reason: str
    """:data:`ABORT` as long as it is not whole."""
    weight_version: str
    """Of its first token."""
    attempts: int
    read_bytes: int
    """Read from SSD and remote for it, by all agents together."""
    request_s: float
    env_s: float = 0.0
    env_timed_out: bool = False
    segments: list[Segment] = []


class VersionSpan(Span):
    """A span of the sample's token ids. ``in_loss``: to be trained on."""

    in_loss: bool = True


class Sample(msgspec.Struct):
    """An ended episode; one line of the journal."""

    row: int
    sample: int
    id: str
    prompt: str | None
    messages: list[JsonObject]
    token_ids: list[int]
    logprobs: list[float]
    """Of the generated tokens, in their order; empty if they were not asked for."""
    prompt_tokens: int
    finish_reason: str
    reward: float | None
    error: str | None
    turns: list[Turn]
    sampling: Sampling
    started_at_s: float
    """Unix time."""
    seconds: float
    versions: list[VersionSpan] = []
    """Of the generated tokens, one after the other."""
    staleness_commits: int = 0
    """How far its oldest tokens' weights were behind those that were served when its group was
    whole."""
    trajectory: int = 0
    """Which of the episode's, in a shard."""
    exit_code: int | None = None
    """Of the harness."""
    branches: list[Branch] = []
    """The episode's other trajectories, from the second on, in the journal."""

    @property
    def is_whole(self) -> bool:
        """Whether the episode has ended."""
        return bool(self.finish_reason)


class Branch(msgspec.Struct):
    """What a trajectory has of its own, as in :class:`Sample`."""

    messages: list[JsonObject]
    token_ids: list[int]
    logprobs: list[float]
    prompt_tokens: int
    turns: list[Turn]
    versions: list[VersionSpan]


class Key(msgspec.Struct):
    """Which sample a line of the journal holds."""

    row: int
    sample: int
    error: str | None


_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("extra", pa.string())])
_SEGMENT = pa.struct(
    [
        ("generated_tokens", pa.int32()),
        ("cached_tokens", pa.int32()),
        ("finish_reason", pa.string()),
    ]
)
_TURN = pa.struct(
    [
        ("prompt_tokens", pa.int32()),
        ("cached_tokens", pa.int32()),
        ("generated_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("weight_version", pa.string()),
        ("attempts", pa.int32()),
        ("read_bytes", pa.int64()),
        ("request_s", pa.float64()),
        ("env_s", pa.float64()),
        ("env_timed_out", pa.bool_()),
        ("segments", pa.list_(_SEGMENT)),
    ]
)
_VERSIONS = pa.struct([("version", pa.string()), ("begin", pa.int32()), ("end", pa.int32())])
_SAMPLING = pa.struct(
    [
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("max_new_tokens", pa.int32()),
        ("seed", pa.int64()),
        ("stop", pa.list_(pa.string())),
    ]
)
COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("row", pa.int64()),
        ("sample", pa.int32()),
        ("trajectory", pa.int32()),
        ("prompt", pa.string()),
        ("messages", pa.list_(_MESSAGE)),
        ("token_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.int8())),
        ("logprobs", pa.list_(pa.float32())),
        ("prompt_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("reward", pa.float64()),
        ("error", pa.string()),
        ("exit_code", pa.int32()),
        ("turns", pa.list_(_TURN)),
        ("weight_version", pa.string()),
        ("weight_versions", pa.list_(_VERSIONS)),
        ("staleness_commits", pa.int32()),
        ("sampling", _SAMPLING),
        ("started_at", pa.timestamp("ms", "UTC")),
        ("seconds", pa.float64()),
    ]
)
TAKEN_NAMES = tuple(n for n in COLUMNS.names if n not in ("id", "prompt", "messages"))
"""Names that no carried column may have; the input's own three are known columns."""
assert set(_SAMPLING.names) == set(SAMPLING_COLUMNS)


def trajectories(sample: Sample) -> list[Sample]:
    """Those of an episode, each a row of a shard."""
    others = [
        msgspec.structs.replace(sample, trajectory=number, **msgspec.structs.asdict(branch))
        for number, branch in enumerate(sample.branches, 1)
    ]
    return [sample, *others]


def sample_columns(samples: Sequence[Sample]) -> list[pa.Array]:
    """The arrays of ``COLUMNS`` for these samples."""
    values: dict[str, Sequence[object]] = {
        "messages": [[_message(m) for m in s.messages] for s in samples],
        "turns": [[_turn(t) for t in s.turns] for s in samples],
        "sampling": [msgspec.to_builtins(s.sampling) for s in samples],
        "weight_version": [s.turns[0].weight_version if s.turns else None for s in samples],
        "weight_versions": [[_versions(v) for v in s.versions] for s in samples],
        "started_at": [round(s.started_at_s * 1000) for s in samples],
    }
    arrays = []
    for field in COLUMNS:
        if field.name == "loss_mask":
            arrays.append(_lists([loss_mask(s) for s in samples], field.type))
        elif field.name == "token_ids":
            ids = [np.asarray(s.token_ids, np.int32) for s in samples]
            arrays.append(_lists(ids, field.type))
        elif field.name == "logprobs":
            arrays.append(_logprobs(samples, field.type))
        else:
            column = values.get(field.name) or [getattr(s, field.name) for s in samples]
            arrays.append(pa.array(column, field.type))
    return arrays


def loss_mask(sample: Sample) -> NDArray[np.int8]:
    """``int8[len(token_ids)]``: 1 where the model generated the token, and it is in the loss."""
    mask = _generated(sample)
    for span in sample.versions:
        mask[span.begin : span.end] &= span.in_loss
    return mask


def _generated(sample: Sample) -> NDArray[np.int8]:
    mask = np.zeros(len(sample.token_ids), np.int8)
    for turn in sample.turns:
        mask[turn.begin : turn.end] = 1
    return mask


def _lists(parts: list[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(part) for part in parts)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), np.concatenate(parts), kind)


def _logprobs(samples: Sequence[Sample], kind: pa.DataType) -> pa.ListArray:
    """As long as the token ids, null where a token was not generated; a null list without any."""
    offsets: list[int | None] = []
    parts, nulls, total = [], [], 0
    for sample in samples:
        if not sample.logprobs:
            offsets.append(None)
            continue
        mask = _generated(sample)
        values = np.zeros(len(mask), np.float32)
        values[mask == 1] = sample.logprobs
        parts.append(values)
        nulls.append(mask == 0)
        offsets.append(total)
        total += len(mask)
    offsets.append(total)
    flat = pa.array([], pa.float32())
    if parts:
        flat = pa.array(np.concatenate(parts), pa.float32(), mask=np.concatenate(nulls))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, kind)


def _message(message: JsonObject) -> dict[str, str | None]:
    """Content that is not text, and every other field, as JSON in ``extra``."""
    content = message.get("content")
    text = content if isinstance(content, str) else None
    extra = {k: v for k, v in message.items() if k not in ("role", "content")}
    if content is not None and text is None:
        extra["content"] = content
    role = message.get("role") or message.get("type") or ""  # an element of /v1/responses
    return {
        "role": str(role),
        "content": text,
        "extra": msgspec.json.encode(extra).decode() if extra else None,
    }


def _turn(turn: Turn) -> JsonObject:
    fields: JsonObject = msgspec.to_builtins(turn)
    del fields["begin"], fields["end"]
    fields["generated_tokens"] = turn.end - turn.begin
    fields["segments"] = [
        {
            "generated_tokens": segment.end - segment.begin,
            "cached_tokens": segment.cached_tokens,
            "finish_reason": segment.finish_reason,
        }
        for segment in turn.segments
    ]
    return fields


def _versions(span: VersionSpan) -> JsonObject:
    return {"version": span.version, "begin": span.begin, "end": span.end}
