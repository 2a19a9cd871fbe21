"""Recurrent layers (Mamba-2, gated delta rule): a hit is the KV of the layers with attention, and a
snapshot of the others' states at its end. Tokens are those of a plain SGLang server, whose own are
those of transformers. Pools are poisoned."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from launch.models.resolve import resolve_model
from tests.cluster import GREEDY, Cluster, plain_sglang, post, prompt, running_cluster
from tests.models.by_transformers import greedy
from tests.models.spoilt_parts import spoil_parts
from tests.prefill_checks import PAGE

CHUNK = 512
LENGTHS = {65: 64, 300: 320, 1054: 1088, 1300: 1344}
"""Of a first prompt; and the last boundary that its turn passes, of the prompt (which P stores) or
of the answer (D): 1054 tokens end with a chunk without any."""
NEW_TOKENS = 48
PARAMETERS = {**GREEDY, "max_new_tokens": NEW_TOKENS}
POLICIES = ("prefill", "decode", "split", "n-way")

pytestmark = [pytest.mark.slow, pytest.mark.whole, pytest.mark.timeout(600)]

Tokens = Callable[[list[int]], list[int]]


@pytest.mark.parametrize("name", ["tiny-hybrid", "tiny-gdn"])
def test_snapshots_are_restored_with_the_kv_of_the_other_layers(tmp_path, name):
    model = resolve_model(name)
    flags = ["--model", name, "--poison-kv", "--load-policy", "always"]
    flags += ["--prefill-quota-ms", "300", "--prefill-args"]
    chunks = ["--chunked-prefill-size", str(CHUNK)]
    plain = plain_sglang(model, tmp_path, *chunks, "--max-mamba-cache-size", "64")
    with plain as served, running_cluster(tmp_path, *flags, " ".join(chunks)) as cluster:

        @cache
        def asked(ids: tuple[int, ...]) -> list[int]:
            body = {"input_ids": list(ids), "sampling_params": PARAMETERS}
            return post(f"{served()}/generate", body).body["output_ids"]

        def tokens(ids: list[int]) -> list[int]:
            return asked(tuple(ids))

        firsts = [prompt(length, length) for length in LENGTHS]
        assert tokens(firsts[1]) == greedy(model, firsts[1], NEW_TOKENS)
        turns = [first_turn(cluster, tokens, ids) for ids in firsts]
        cluster.wait_stored()
        for number, ids in enumerate(turns):
            cluster.set_policy(POLICIES[number % len(POLICIES)])
            check_hit(cluster, tokens, ids, LENGTHS[len(firsts[number])])
        cluster.restart_agents()
        check_hit(cluster, tokens, firsts[-1], len(firsts[-1]) // PAGE * PAGE)  # of the SSD
        check_spoilt_states(cluster, tokens, firsts[-2], tmp_path / "ssd", is_checked=False)
        check_spoilt_states(cluster, tokens, firsts[-1], tmp_path / "ssd", is_checked=True)


def first_turn(cluster: Cluster, tokens: Tokens, ids: list[int]) -> list[int]:
    """What is asked next."""
    reply = cluster.generate(ids, sampling_params=PARAMETERS).output_ids
    assert reply == tokens(ids), len(ids)
    return ids + reply + prompt(PAGE - 1, seed=1)


def check_hit(cluster: Cluster, tokens: Tokens, ids: list[int], hit: int) -> None:
    """All of it goes to P, and to D all but the state."""
    cluster.flush_engines()
    answer = cluster.generate(ids, sampling_params=PARAMETERS)
    assert answer.output_ids == tokens(ids), len(ids)
    assert answer.cached_tokens == hit, len(ids)
    delivered = answer.trace["delivered_bytes"]
    assert delivered["p0"] > delivered["d0"] > 0


def check_spoilt_states(
    cluster: Cluster, tokens: Tokens, ids: list[int], folder: Path, is_checked: bool
) -> None:
    """The control: noise in place of states gives other tokens if its checksum is right, so what
    is compared above would have shown states that were left out; else it makes the hit shorter."""
    spoil_parts(cluster, folder, "state", is_checked)
    answer = cluster.generate(ids, sampling_params=PARAMETERS)
    assert (answer.output_ids == tokens(ids)) == is_checked
    assert (answer.cached_tokens < len(ids) // PAGE * PAGE) == is_checked
    cluster.wait_stored()
