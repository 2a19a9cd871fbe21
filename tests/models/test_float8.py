"""KV in float8: tokens are those of a plain SGLang server with the same type. Pools are poisoned.
Each engine has one rank: more add up in another order, which may round a number otherwise."""

from __future__ import annotations

import functools

import pytest

from launch.models.resolve import resolve_model
from tests.cluster import GREEDY, Cluster, plain_sglang, post, prompt, running_cluster
from tests.prefill_checks import (
    PAGE,
    SECOND_TURN_NEW_TOKENS,
    SECOND_TURN_TOKENS,
    check_a_second_turn,
)

LENGTHS = (65, 300, 1500)
FLOAT8 = ["--kv-cache-dtype", "fp8_e4m3"]

pytestmark = [pytest.mark.slow, pytest.mark.whole, pytest.mark.timeout(600)]


def tokens_of(url: str, input_ids: list[int]) -> list[int]:
    body = {"input_ids": input_ids, "sampling_params": GREEDY}
    return post(f"{url}/generate", body).body["output_ids"]


def second_turn_of(url: str, input_ids: list[int]) -> list[int]:
    """Behind an answer of its own: KV that is computed token by token is in float8 not that of the
    same tokens computed at once."""
    first = {**GREEDY, "max_new_tokens": SECOND_TURN_NEW_TOKENS}
    body = {"input_ids": input_ids[:SECOND_TURN_TOKENS], "sampling_params": first}
    reply = post(f"{url}/generate", body).body["output_ids"]
    assert input_ids[SECOND_TURN_TOKENS:][:SECOND_TURN_NEW_TOKENS] == reply
    return tokens_of(url, input_ids)


@pytest.mark.parametrize(
    ("model", "token_bytes", "flags"),
    [
        ("tiny", 2048, []),
        # Latents of 128 float8 numbers with a scale, 64 bfloat16 numbers with a position.
        ("tiny-dsa", 6 * 260 + 5 * 132, ["--attention-backend", "dsa"]),
    ],
    ids=["heads", "latents with scales"],
)
def test_kv_of_eight_bits(tmp_path, model, token_bytes, flags):
    cluster_flags = ["--model", model, "--poison-kv", "--load-policy", "always"]
    cluster_flags += ["--max-total-tokens", "20480", "--engine-args", " ".join(FLOAT8)]
    with (
        plain_sglang(resolve_model(model), tmp_path, *FLOAT8, *flags) as plain,
        running_cluster(tmp_path, *cluster_flags) as cluster,
    ):
        expected = [tokens_of(plain(), prompt(length, length)) for length in LENGTHS]
        check_answers(cluster, expected, [0] * len(LENGTHS))
        cluster.wait_stored()
        blocks = sum((length + 15) // PAGE for length in LENGTHS)
        pulled_bytes = cluster.metric_sum("dualpath:agent_pulled_bytes_total")
        assert pulled_bytes == blocks * PAGE * token_bytes
        hits = [(length - 1) // PAGE * PAGE for length in LENGTHS]
        cluster.flush_engines()
        check_answers(cluster, expected, hits)
        cluster.restart_agents()  # of the SSD
        cluster.set_policy("split")
        cluster.flush_engines()
        check_answers(cluster, expected, hits)
        check_a_second_turn(cluster, functools.partial(second_turn_of, plain()))


def check_answers(cluster: Cluster, expected: list[list[int]], hits: list[int]) -> None:
    for length, tokens, hit in zip(LENGTHS, expected, hits, strict=True):
        answer = cluster.generate(prompt(length, length))
        assert (answer.output_ids, answer.cached_tokens) == (tokens, hit), length
