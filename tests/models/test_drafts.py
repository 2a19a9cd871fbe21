"""Multi-token prediction: what a draft keeps of the prefix is part of a block. Without it tokens
are right all the same, since the model checks each, but hardly any of the draft's is accepted.
Tokens and acceptance are those of a plain SGLang server. The pools of both are poisoned."""

from __future__ import annotations

import os

import pytest

from launch.models.resolve import resolve_model
from tests.cluster import GREEDY, Answer, Cluster, plain_sglang, post, prompt, running_cluster
from tests.prefill_checks import PAGE

FLAGS = "--speculative-algorithm EAGLE --speculative-num-steps 1 --speculative-eagle-topk 1"
FLAGS += " --speculative-num-draft-tokens 2"
LATENT_BYTES, INDEX_BYTES = PAGE * 192 * 4, PAGE * 132
BLOCK_BYTES = 3 * LATENT_BYTES + 2 * INDEX_BYTES
"""Of two layers, the second without an indexer, and the draft's."""
PROMPTS = [prompt(length, length) for length in (130, 700)]
NEW_TOKENS = 60
WITHOUT_DRAFT = """
import os, sys
if "transfer.agent" in sys.orig_argv:
    from transfer.agent.jobs import layers
    move = layers.LayerMover._ranges
    def ranges(mover, transfer, layers):
        is_draft = layers.start >= transfer.groups[0].layout.model_layers
        if is_draft and not transfer.is_read and os.path.exists(os.environ["WITHOUT_DRAFT"]):
            return iter(())
        return move(mover, transfer, layers)
    layers.LayerMover._ranges = ranges
"""
"""Has agents leave the draft's layers out of what they deliver, while a file is there."""

pytestmark = [pytest.mark.slow, pytest.mark.whole, pytest.mark.timeout(600)]


def accepted(answer: Answer) -> float:
    """Tokens for each that the model was asked for."""
    meta = answer.body["meta_info"]
    return meta["completion_tokens"] / meta["spec_verify_ct"]


def test_a_draft_is_restored_with_its_model_by_every_path(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_DRAFT)
    left_out = tmp_path / "left out"
    monkeypatch.setenv("WITHOUT_DRAFT", str(left_out))
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [path])]))
    model = resolve_model("tiny-mtp")
    flags = ["--model", "tiny-mtp", "--poison-kv", "--load-policy", "always"]
    flags += ["--dram-bytes", str(60 * BLOCK_BYTES), "--max-total-tokens", "8192"]
    flags += ["--engine-args", FLAGS]
    with (
        plain_sglang(model, tmp_path, "--attention-backend", "dsa", *FLAGS.split()) as served,
        running_cluster(tmp_path, *flags) as cluster,
    ):
        plain = Plain(served())
        for ids in PROMPTS:
            check_as_plain(cluster, plain, ids, 0)
        cluster.wait_stored()
        stored = sum((len(ids) + NEW_TOKENS - 1) // PAGE for ids in PROMPTS) * BLOCK_BYTES
        assert cluster.metric_sum("dualpath:agent_pulled_bytes_total") == stored
        for policy in ("prefill", "decode", "split"):
            cluster.set_policy(policy)
            check_hits(cluster, plain)
        cluster.restart_agents()  # of the SSD
        check_hits(cluster, plain)
        check_a_second_turn(cluster, plain)
        left_out.touch()
        check_the_control(cluster, plain)


class Plain:
    """Answers of ordinary SGLang."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, ids: list[int]) -> Answer:
        params = {**GREEDY, "max_new_tokens": NEW_TOKENS}
        post(f"{self._url}/flush_cache", {})
        return post(f"{self._url}/generate", {"input_ids": ids, "sampling_params": params})


def generate(cluster: Cluster, ids: list[int]) -> Answer:
    return cluster.generate(ids, sampling_params={"max_new_tokens": NEW_TOKENS})


def check_as_plain(cluster: Cluster, plain: Plain, ids: list[int], cached_tokens: int) -> None:
    right, answer = plain(ids), generate(cluster, ids)
    assert 1.3 < accepted(right) < 1.95, "or it would show nothing"
    assert answer.output_ids == right.output_ids
    assert answer.cached_tokens == cached_tokens
    assert accepted(answer) >= 0.98 * accepted(right)


def check_hits(cluster: Cluster, plain: Plain) -> None:
    cluster.flush_engines()
    for ids in PROMPTS:
        check_as_plain(cluster, plain, ids, (len(ids) - 1) // PAGE * PAGE)


def check_a_second_turn(cluster: Cluster, plain: Plain) -> None:
    """It finds the first one, generated tokens included."""
    first = PROMPTS[1]
    reply = generate(cluster, first).output_ids
    cluster.wait_stored()
    cluster.flush_engines()
    second = first + reply + prompt(40, 11)
    check_as_plain(cluster, plain, second, (len(first) + len(reply) - 1) // PAGE * PAGE)


def check_the_control(cluster: Cluster, plain: Plain) -> None:
    """The draft's KV left out of deliveries: it is seen in what is accepted, and only there."""
    cluster.flush_engines()
    ids = PROMPTS[1]
    right, answer = plain(ids), generate(cluster, ids)
    assert answer.output_ids == right.output_ids
    assert accepted(answer) < 0.8 * accepted(right)
