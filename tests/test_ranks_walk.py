"""Tensor-parallel engines: tokens are those of plain SGLang of the same size, whatever path a
block took and by whichever number of ranks it was computed. Pools are poisoned."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.models.resolve import resolve_model
from launch.models.tiny_mla import BLOCK_BYTES as MLA_BLOCK_BYTES
from tests.cluster import Cluster, PlainTokens, prompt, running_cluster, shared_plain
from tests.models.by_transformers import greedy
from tests.prefill_checks import PAGE, check_agents_that_die, check_sampled_prompts

BLOCK_BYTES = 8192 * PAGE
CHUNK = 1024
LENGTHS = (64, 65, 3000)

pytestmark = [pytest.mark.slow, pytest.mark.whole, pytest.mark.timeout(600)]


def expected_hit(length: int) -> int:
    return (length - 1) // PAGE * PAGE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def plain() -> PlainTokens:
    """Of plain SGLang with two ranks."""
    return shared_plain("--tp", "2")


@contextlib.contextmanager
def cluster_of(folder, prefill_tp: int, decode_tp: int, *more: str) -> Iterator[Cluster]:
    """All clusters of this file have one store after another."""
    flags = ["--model", "tiny", "--poison-kv", "--load-policy", "always"]
    flags += ["--dram-bytes", str(200 * BLOCK_BYTES), "--ssd-dir", str(folder / "ssd")]
    flags += ["--max-total-tokens", "20480"]  # a small pool is poisoned sooner
    flags += ["--prefill-args", f"--tp {prefill_tp}", "--decode-args", f"--tp {decode_tp}"]
    flags += more
    with running_cluster(folder / f"p{prefill_tp}d{decode_tp}", *flags) as running:
        yield running


def check_hits(cluster, plain, *policies: str) -> None:
    """Every prompt is in the store as a whole, and is answered from it."""
    for policy in policies:
        cluster.set_policy(policy)
        cluster.flush_engines()
        for length in LENGTHS:
            answer = cluster.generate(prompt(length, length))
            assert answer.output_ids == plain(prompt(length, length)), (policy, length)
            assert answer.cached_tokens == expected_hit(length), (policy, length)
            hit_bytes = expected_hit(length) // PAGE * BLOCK_BYTES
            delivered = {"p0": hit_bytes, "d0": hit_bytes} if hit_bytes else {}
            assert answer.trace["delivered_bytes"] == delivered, (policy, length)


def check_turns(cluster, plain, seed: int) -> None:
    """A second turn finds the first one, generated tokens included."""
    first = prompt(900, seed)
    reply = cluster.generate(first, sampling_params={"max_new_tokens": 100}).output_ids
    assert reply == plain(first, max_new_tokens=100)
    cluster.wait_stored()
    cluster.flush_engines()
    second = first + reply + prompt(40, seed + 1)
    answer = cluster.generate(second)
    assert answer.output_ids == plain(second)
    assert answer.cached_tokens == (len(first) + len(reply) - 1) // PAGE * PAGE


def test_two_ranks_on_both_sides_with_a_layer_window(folder, plain):
    """P has the KV of three of the eight layers, and a quota that cuts long contexts below its
    chunk size."""
    window = ["--prefill-layer-window", "3", "--prefill-quota-ms", "60"]
    window += ["--prefill-args", f"--tp 2 --chunked-prefill-size {CHUNK}"]
    with cluster_of(folder, 2, 2, *window) as cluster:
        for length in LENGTHS:
            cold = cluster.generate(prompt(length, length))
            assert cold.output_ids == plain(prompt(length, length)), length
            assert cold.cached_tokens == 0
        cluster.wait_stored()
        check_hits(cluster, plain, "prefill", "decode")
        check_sampled_prompts(cluster, plain, [prompt(3000, 3000)], examples=4)
        assert cluster.metric_sum("engine_read_back_pages_total") > 0, "chunks of one prompt"
        check_turns(cluster, plain, seed=10)
        turns = [prompt(3000, 3000) + prompt(20, 50 + i) for i in range(4)]
        check_agents_that_die(cluster, plain, turns, after_s=0.4)


@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(2, 1), (1, 2)])
def test_unlike_sizes_and_the_blocks_of_others(folder, plain, prefill_tp, decode_tp):
    """P has the KV of all layers. Blocks come from the test before: from a P with a window, and
    from two ranks at D. (Two ranks on both sides, without a window, are in
    tests/launch/node/test_engines_over_hosts.py.)"""
    with cluster_of(folder, prefill_tp, decode_tp) as cluster:
        check_hits(cluster, plain, "split")
        seed = 100 * prefill_tp + 10 * decode_tp
        check_turns(cluster, plain, seed)
        cold = prompt(3000, seed + 2)
        answer, elapsed_s = timed(cluster.generate, cold)
        expected, plain_s = timed(plain, cold)
        assert answer.output_ids == expected
        # Token by token it takes a minute, where nothing else runs.
        assert elapsed_s < max(20, 10 * plain_s)


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What it returns, and in how many seconds."""
    started = time.monotonic()
    return call(*arguments), time.monotonic() - started


@pytest.fixture(scope="module")
def mla() -> Path:
    """A model with latent KV, and with experts in the last layers."""
    return resolve_model("tiny-mla")


@contextlib.contextmanager
def mla_cluster(folder: Path, model: Path, *more: str) -> Iterator[Cluster]:
    flags = ["--model", str(model), "--poison-kv", "--load-policy", "always"]
    flags += ["--dram-bytes", str(200 * MLA_BLOCK_BYTES), *more]
    with running_cluster(folder, *flags) as cluster:
        yield cluster


def test_latent_kv_is_stored_once_and_delivered_whole_to_each_rank(folder, mla):
    """From one rank, which has the KV of all layers, to two ranks. (Of two layers:
    tests/models/test_sparse_attention.py. Groups: tests/launch/node/test_engines_over_hosts.py.)"""
    prompts = [prompt(length, length) for length in (65, 1500)]
    reference = functools.partial(greedy, mla)
    flags = ["--decode-args", "--tp 2", "--prefill-args", f"--chunked-prefill-size {CHUNK}"]
    with mla_cluster(folder / "mla-cluster", mla, *flags) as cluster:
        for ids in prompts:
            assert cluster.generate(ids).output_ids == reference(ids)
        cluster.wait_stored()
        stored = sum((len(ids) + 15) // PAGE for ids in prompts) * MLA_BLOCK_BYTES
        assert cluster.metric_sum("dualpath:agent_pulled_bytes_total") == stored
        for policy in ("prefill", "split"):
            cluster.set_policy(policy)
            cluster.flush_engines()
            for ids in prompts:
                answer = cluster.generate(ids)
                assert answer.output_ids == reference(ids)
                assert answer.cached_tokens == expected_hit(len(ids))
                hit_bytes = expected_hit(len(ids)) // PAGE * MLA_BLOCK_BYTES
                assert answer.trace["delivered_bytes"] == {"p0": hit_bytes, "d0": 2 * hit_bytes}
        check_sampled_prompts(cluster, reference, prompts[1:], examples=4)
        assert cluster.metric_sum("engine_read_back_pages_total") == 0, "P has all layers"
