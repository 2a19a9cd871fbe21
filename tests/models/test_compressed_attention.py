"""DeepSeek-V4: a hit is compressed latents, index keys, and at its end a page of windows with the
states of groups of 4. Tokens are those of transformers, which rounds as the pool does. Pools are
poisoned.

A number at the border of two of float8 is rounded by chance, and 6 % away: of 100 prompts' tokens a
few are other ones on another machine. These prompts' are the same with noise of 1e-6 in all
embeddings.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.models.resolve import resolve_model
from tests.cluster import GREEDY, Cluster, prompt, running_cluster
from tests.models.compressed_reference import SPOILERS, behind_a_prefix, greedy

PAGE = 256
BLOCK_BYTES = 2 * (37_440 + 8_448) + 1_728
WINDOW_BYTES = 4 * 149_760 + 2 * (65_536 + 16_384)
SEEDS = {130: 1, 257: 1, 300: 5, 511: 3, 700: 4}
"""By length, around the ends of windows and pages; the last one is computed in two chunks."""
STATE_SEEDS = (1, 4, 5, 8)
NEW_TOKENS = 12
POLICIES = ("prefill", "decode", "split")

pytestmark = [pytest.mark.slow, pytest.mark.whole, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def model() -> Path:
    return resolve_model("tiny-v4")


def test_a_prefix_that_lacks_anything_gives_other_tokens(model):
    """The control: what follows would see it."""
    ids = prompt(700, SEEDS[700])
    right = behind_a_prefix(model, ids, 2 * PAGE)
    assert right == greedy(model, ids, NEW_TOKENS)[: len(right)]
    for spoiler in SPOILERS.keys() - {"states"}:
        assert behind_a_prefix(model, ids, 2 * PAGE, spoiler) != right, spoiler
    # They make one group of two layers, which not every prompt looks at.
    prompts = [prompt(2 * PAGE + 8, seed) for seed in STATE_SEEDS]
    answers = [
        [behind_a_prefix(model, ids, 2 * PAGE, spoiler) for spoiler in ("", "states")]
        for ids in prompts
    ]
    assert any(right != spoilt for right, spoilt in answers)


def test_all_of_it_is_restored_by_every_path(tmp_path, model):
    flags = ["--model", "tiny-v4", "--poison-kv", "--load-policy", "always"]
    flags += ["--prefill-args", "--chunked-prefill-size 512"]
    with running_cluster(tmp_path, *flags) as cluster:
        for length in SEEDS:
            check(cluster, model, length, hit=0)
        cluster.wait_stored()
        for number, length in enumerate([*SEEDS][1:]):
            cluster.set_policy(POLICIES[number % len(POLICIES)])
            cluster.flush_engines()
            hit = (length - 1) // PAGE
            trace = check(cluster, model, length, hit)
            assert trace["delivered_bytes"]["p0"] == hit * BLOCK_BYTES + WINDOW_BYTES, length
        cluster.restart_agents()  # of the SSD
        cluster.flush_engines()
        check(cluster, model, 700, hit=2)
        check(cluster, model, 511, hit=1)


def check(cluster: Cluster, model: Path, length: int, hit: int) -> dict:
    ids = prompt(length, SEEDS[length])
    answer = cluster.generate(ids, sampling_params={**GREEDY, "max_new_tokens": NEW_TOKENS})
    assert answer.output_ids == greedy(model, ids, NEW_TOKENS), length
    assert answer.cached_tokens == hit * PAGE, length
    return answer.trace
