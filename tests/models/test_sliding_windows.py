"""Sliding windows (gpt-oss): a hit is the KV of the layers that keep all of it, and at its end the
windows of the others. Tokens are those of a plain SGLang server. Pools are poisoned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

import pytest

from launch.models.resolve import resolve_model
from tests.cluster import GREEDY, Cluster, plain_sglang, post, prompt, running_cluster
from tests.models.spoilt_parts import spoil_parts
from tests.prefill_checks import PAGE

PAGE_BYTES = 4 * 2 * PAGE * 2 * 64 * 4
"""Of the four layers with all their KV, and of the four with windows."""
WINDOW_PAGES = 2
LENGTHS = (63, 127, 129, 190, 192, 255, 257, 1300)
"""Around the ends of pages and windows; the last one is computed in three chunks."""
NEW_TOKENS = 20
POLICIES = ("prefill", "decode", "split")

pytestmark = [pytest.mark.slow, pytest.mark.whole, pytest.mark.timeout(600)]

Tokens = Callable[[list[int]], list[int]]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Iterator[Tokens]:
    """Of plain SGLang, which may still be starting: a cluster starts meanwhile."""
    with plain_sglang(resolve_model("tiny-swa"), tmp_path_factory.mktemp("plain")) as served:

        @cache
        def asked(ids: tuple[int, ...]) -> list[int]:
            body = {"input_ids": list(ids), "sampling_params": PARAMETERS}
            return post(f"{served()}/generate", body).body["output_ids"]

        yield lambda ids: asked(tuple(ids))


def cluster_of(folder: Path, *more: str) -> AbstractContextManager[Cluster]:
    flags = ["--model", "tiny-swa", "--poison-kv", "--load-policy", "always"]
    flags += ["--dram-bytes", str(300 * PAGE_BYTES), "--max-total-tokens", "20480"]
    return running_cluster(folder, *flags, "--prefill-args", "--chunked-prefill-size 512", *more)


def test_ranks_split_windows_by_heads(tmp_path, tokens):
    """P and D of two ranks, P with a quota, whose cost knows windows. (Of sizes unlike each other:
    tests/transfer/agent/test_parts.py.)"""
    ranks = ["--prefill-args", "--tp 2", "--decode-args", "--tp 2"]
    with cluster_of(tmp_path, *ranks, "--prefill-quota-ms", "300") as cluster:
        turns = [second_turn(cluster, tokens, prompt(n, seed=n)) for n in (129, 1300)]
        cluster.wait_stored()
        for policy, ids in zip(("split", "prefill"), turns, strict=True):
            cluster.set_policy(policy)
            check_hit(cluster, tokens, ids)
        assert cluster.metric_sum("dualpath:engine_quota_batches_total") > 0


def test_windows_are_restored_with_the_kv_of_the_other_layers(tmp_path, tokens):
    with cluster_of(tmp_path) as cluster:
        turns = [second_turn(cluster, tokens, prompt(n, seed=n)) for n in LENGTHS]
        cluster.wait_stored()
        for number, ids in enumerate(turns):
            cluster.set_policy(POLICIES[number % len(POLICIES)])
            check_hit(cluster, tokens, ids)
        cluster.restart_agents()
        check_hit(cluster, tokens, turns[-1], asked_before=True)  # of the SSD
        check_spoilt_windows(cluster, tokens, turns[-2], tmp_path / "ssd", is_checked=False)
        check_spoilt_windows(cluster, tokens, turns[-1], tmp_path / "ssd", is_checked=True)


PARAMETERS = {**GREEDY, "max_new_tokens": NEW_TOKENS}


def second_turn(cluster: Cluster, tokens: Tokens, ids: list[int]) -> list[int]:
    """What is asked behind a first turn, whose last token's KV nobody has computed."""
    reply = cluster.generate(ids, sampling_params=PARAMETERS).output_ids
    assert reply == tokens(ids), len(ids)
    return ids + reply + prompt(PAGE - 1, seed=1)


def longest_hit(ids: list[int], asked_before: bool = False) -> int:
    """Of a second turn: all that its first one has computed, or it itself. D has stored the
    windows from the end of each prompt on."""
    return (len(ids) - (1 if asked_before else PAGE)) // PAGE * PAGE


def check_hit(cluster: Cluster, tokens: Tokens, ids: list[int], asked_before: bool = False) -> None:
    """P gets the blocks and the last windows of them; D the blocks before P's windows begin."""
    cluster.flush_engines()
    answer = cluster.generate(ids, sampling_params=PARAMETERS)
    assert answer.output_ids == tokens(ids), len(ids)
    hit = longest_hit(ids, asked_before)
    assert answer.cached_tokens == hit, len(ids)
    pages = hit // PAGE
    windows = min(WINDOW_PAGES, pages)
    assert answer.trace["delivered_bytes"]["p0"] == (pages + windows) * PAGE_BYTES


def check_spoilt_windows(
    cluster: Cluster, tokens: Tokens, ids: list[int], folder: Path, is_checked: bool
) -> None:
    """The control: noise in place of windows gives other tokens if its checksum is right, so what
    is compared above would have shown windows that were left out; else it makes the hit shorter."""
    spoil_parts(cluster, folder, "window", is_checked)
    answer = cluster.generate(ids, sampling_params=PARAMETERS)
    assert (answer.output_ids == tokens(ids)) == is_checked
    assert (answer.cached_tokens < longest_hit(ids, asked_before=True)) == is_checked
    cluster.wait_stored()
