"""Conversations, and the tokens that plain SGLang answers them with."""

from __future__ import annotations

import contextlib
import random
import shutil
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.own_cluster import ClusterFailed, free_port
from benchmarks.plain_sglang import close_fork_server, plain_sglang
from launch.cluster.layout import PAGE_TOKENS

VOCABULARY = range(300, 2000)
"""Ordinary words, no special token among them."""
NEW_TOKENS = 16
TURNS = 3
TIE_MARGIN = 1e-3
"""Of the logarithm of the probability, between the two likeliest tokens: some hundred times what
batches of other sizes change in float32. A turn with a smaller one has no right answer."""
ANSWER_TIMEOUT_S = 60.0

_POOL = ("--max-total-tokens", "16384")

FIRST, SECOND = "default", "second"
"""Versions of the weights, by the names that SGLang says in its answers."""


class Turn(msgspec.Struct, frozen=True):
    """One prompt, and its right answers by the version of the weights; a tie has none."""

    prompt: list[int]
    right: dict[str, list[int]]
    new_tokens: int = NEW_TOKENS


Conversation = list[Turn]


def make_other_weights(model: Path, folder: Path, layer: int = 3) -> Path:
    """The same model with other weights in one layer."""
    from safetensors.torch import load_file, save_file  # slow to import

    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    weights[name] = weights[name] * -1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_conversations(
    count: int,
    rng: random.Random,
    models: dict[str, Path],
    folder: Path,
    new_tokens: int = NEW_TOKENS,
) -> list[Conversation]:
    """Each turn goes on from the first version's answer to the turn before; answers have
    ``new_tokens``.

    Raises :class:`ClusterFailed` when plain SGLang does not answer.
    """
    prompts = [rng.choices(VOCABULARY, k=rng.randint(200, 1400)) for _ in range(count)]
    turns: list[list[tuple[list[int], dict[str, list[int]]]]] = [[] for _ in range(count)]
    with contextlib.ExitStack() as stack:
        stack.callback(close_fork_server)
        ports = {version: free_port() + 600 * i for i, version in enumerate(models)}
        served = {
            version: stack.enter_context(
                plain_sglang(models[version], port, folder / f"{version}.log", *_POOL)
            )
            for version, port in ports.items()
        }
        servers = {version: wait() for version, wait in served.items()}
        for number in range(count * TURNS):
            index, prompt = number % count, prompts[number % count]
            right = {}
            for version, url in servers.items():
                tokens, margin = _ask(url, prompt, new_tokens)
                if margin >= TIE_MARGIN:
                    right[version] = tokens
                if version == FIRST:
                    appended = rng.choices(VOCABULARY, k=rng.randint(10, PAGE_TOKENS))
                    prompts[index] = prompt + tokens + appended
            turns[index].append((prompt, right))
    return [[Turn(*turn, new_tokens) for turn in conversation] for conversation in turns]


def sampling(new_tokens: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}


def _ask(url: str, prompt: list[int], new_tokens: int) -> tuple[list[int], float]:
    """Tokens, and how much likelier each was than the next best one at least."""
    body = {
        "input_ids": prompt,
        "sampling_params": sampling(new_tokens),
        "return_logprob": True,
        "top_logprobs_num": 2,
    }
    request = urllib.request.Request(
        f"{url}/generate", msgspec.json.encode(body), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as response:
            answer = msgspec.json.decode(response.read())
    except OSError as error:
        raise ClusterFailed(f"plain SGLang does not answer: {error}") from error
    return answer["output_ids"], tie_margin(answer["meta_info"]["output_top_logprobs"])


def tie_margin(top: Sequence[Sequence[Sequence[Any]]]) -> float:
    """Of SGLang's two likeliest tokens at each place, ``[[logprob, id, text], ...]``."""
    return min(best[0] - second[0] for best, second in top)
