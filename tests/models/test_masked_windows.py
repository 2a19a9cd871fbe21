"""A model whose windows are a mask over a plain pool (Gemma-3) is restored as any other: tokens are
those of transformers, pools are poisoned, prompts are longer than a window (128 tokens)."""

from __future__ import annotations

import pytest

from launch.models.resolve import resolve_model
from tests.cluster import prompt, running_cluster
from tests.models.by_transformers import greedy

LENGTHS = (65, 300, 1500)

pytestmark = [pytest.mark.slow, pytest.mark.whole, pytest.mark.timeout(600)]


def test_windows_by_a_mask_are_restored_by_every_path(tmp_path):
    model = resolve_model("tiny-gemma3")
    prompts = [prompt(length, length) for length in LENGTHS]
    flags = ["--model", "tiny-gemma3", "--poison-kv", "--load-policy", "always"]
    with running_cluster(tmp_path, *flags) as cluster:
        for ids in prompts:
            assert cluster.generate(ids).output_ids == greedy(model, ids)
        cluster.wait_stored()
        for policy in ("prefill", "decode", "split"):
            cluster.set_policy(policy)
            cluster.flush_engines()
            for ids in prompts:
                answer = cluster.generate(ids)
                assert answer.output_ids == greedy(model, ids), (policy, len(ids))
                assert answer.cached_tokens == (len(ids) - 1) // 64 * 64, (policy, len(ids))
