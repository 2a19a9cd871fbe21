"""slime's ``--custom-generate-function-path launch.rollout.adapters.slime.generate``: a sample is
what a harness does (docs/rollout.md), recorded to the token.

slime runs it in its own process, with this repository on ``PYTHONPATH`` and the gateway as its
router. A file of its ``--custom-config-path`` has the ``harness``, and may have
``harness_timeout_s``, ``harness_max_turns`` and ``harness_max_tokens``. The harness's row has the
sample's ``prompt``, ``label`` and ``metadata``; without a reward in its result slime's own reward
function is asked. Of more than one trajectory slime gets a list of samples.
"""

from __future__ import annotations

import asyncio
import copy
from argparse import Namespace
from collections.abc import Mapping
from enum import Enum
from typing import Protocol, TypeVar

from common.json import JsonObject
from launch.rollout.input.rows import Sampling
from launch.rollout.output.schema import Branch
from launch.rollout.recording.episode import branch_of
from launch.rollout.recording.passing_client import PassingClient
from launch.rollout.recording.process import BadResult, Ended, Limits, run_harness
from launch.rollout.recording.recorder import Bounds, Recorder
from launch.rollout.recording.server import RecordingServer
from launch.rollout.slots import Slots

TIMEOUT_S, RETRY_S = 600.0, 300.0
"""Of one request, as ``launch.rollout`` has them."""
HARNESS_TIMEOUT_S, MAX_TURNS, MAX_TOKENS = 3600.0, 16, 32768
OUTPUT_BYTES = 1 << 20
_NO_LIMIT = 1 << 30
"""slime itself bounds how many samples are generated at once."""


class Sample(Protocol):
    """What is read or set of slime's (``slime/utils/types.py``)."""

    prompt: str | list[JsonObject]
    label: str | None
    metadata: JsonObject
    tokens: list[int]
    response: str
    response_length: int
    loss_mask: list[int] | None
    rollout_log_probs: list[float] | None
    weight_versions: list[str]
    reward: float | None


S = TypeVar("S", bound=Sample)


async def generate(
    args: Namespace, sample: S, sampling_params: Mapping[str, object]
) -> S | list[S]:
    """Run the harness once, from the beginning also where it was aborted before."""
    server = await _serving(args)
    bounds = Bounds(
        getattr(args, "harness_max_turns", MAX_TURNS),
        getattr(args, "harness_max_tokens", MAX_TOKENS),
    )
    slots = Slots(_NO_LIMIT, _NO_LIMIT)
    recorder = Recorder(bounds, server.client, slots, _sampling(sampling_params), server.model)
    key = server.open(recorder)
    limits = Limits(getattr(args, "harness_timeout_s", HARNESS_TIMEOUT_S), OUTPUT_BYTES)
    row: JsonObject = {"prompt": sample.prompt, "label": sample.label, "metadata": sample.metadata}
    ended: Ended | None = None
    try:
        ended = await run_harness(args.harness, f"{server.url}/{key}", row, limits)
    except BadResult:
        pass  # the sample has failed
    finally:
        server.close(key)
        await recorder.close()
    found = [branch_of(turns, logprobs=True) for turns in recorder.turns.trajectories]
    if not found:
        return _failed(sample)
    samples = [sample, *(copy.copy(sample) for _ in found[1:])]
    for one, branch in zip(samples, found, strict=True):
        _fill(one, branch, ended, is_limited=bool(recorder.limit))
    return samples if len(samples) > 1 else sample


def _sampling(given: Mapping[str, object]) -> Sampling:
    names = ("temperature", "top_p", "max_new_tokens")
    temperature, top_p, limit = (float(str(given[name])) for name in names)
    return Sampling(temperature, top_p, int(limit), None, [])


def _failed(sample: S) -> S:
    _end_as(sample, "FAILED")
    return sample


def _end_as(sample: Sample, name: str) -> None:
    """``name``: of a member of slime's ``Sample.Status``."""
    kind: type[Enum] = vars(type(sample))["Status"]
    vars(sample)["status"] = kind[name]


def _fill(sample: Sample, branch: Branch, ended: Ended | None, is_limited: bool) -> None:
    """slime's masks and log-probabilities are those of what follows the first prompt."""
    first = branch.prompt_tokens
    mask, logprobs = [0] * len(branch.token_ids), [0.0] * len(branch.token_ids)
    given = iter(branch.logprobs)
    for turn in branch.turns:
        mask[turn.begin : turn.end] = [1] * (turn.end - turn.begin)
        logprobs[turn.begin : turn.end] = [next(given) for _ in range(turn.begin, turn.end)]
    sample.tokens, sample.response_length = branch.token_ids, len(branch.token_ids) - first
    sample.loss_mask, sample.rollout_log_probs = mask[first:], logprobs[first:]
    sample.weight_versions = [turn.weight_version for turn in branch.turns]
    sample.response = str(branch.messages[-1].get("content") or "")
    sample.reward = ended.reward if ended is not None else None
    is_cut = is_limited or branch.turns[-1].finish_reason == "length"
    if branch.turns[-1].finish_reason == "abort":
        status = "ABORTED"
    elif ended is None or ended.is_late or (ended.exit_code and not is_limited):
        status = "FAILED"
    else:
        status = "TRUNCATED" if is_cut else "COMPLETED"
    _end_as(sample, status)


_servers: dict[str, asyncio.Task[RecordingServer]] = {}


async def _serving(args: Namespace) -> RecordingServer:
    """One server for all samples of this process."""
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}"
    if url not in _servers:
        _servers[url] = asyncio.create_task(_serve(url))
    return await _servers[url]


async def _serve(url: str) -> RecordingServer:
    client = PassingClient([url], TIMEOUT_S, RETRY_S)
    server = RecordingServer(client, "127.0.0.1", await client.model())
    return await server.__aenter__()
