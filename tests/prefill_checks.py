"""What holds for every prefill engine, whatever holds its KV: sampled by hypothesis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cluster import Cluster, prompt

PAGE = 64
POLICIES = ("prefill", "decode", "split")


def check_sampled_prompts(
    cluster: Cluster,
    reference: Callable[[list[int]], list[int]],
    bases: Sequence[list[int]],
    examples: int,
) -> None:
    """Prompts of which 0, 50 or 97 % are in the store, by some policy: ``reference``'s tokens.

    ``bases``: stored prompts of one length, at least 80. The same samples in each run.
    """

    @given(
        st.integers(80, len(bases[0])),
        st.sampled_from([0, 50, 97]),
        st.sampled_from(range(len(bases))),
        st.sampled_from(POLICIES),
    )
    @settings(max_examples=examples, derandomize=True, database=None, deadline=None)
    def check(length: int, hit_percent: int, base: int, policy: str) -> None:
        hit = length * hit_percent // 100
        ids = bases[base][:hit] + prompt(length - hit, seed=length * 7 + hit_percent)
        cluster.set_policy(policy)
        cluster.flush_engines()
        answer = cluster.generate(ids)
        assert answer.output_ids == reference(ids)
        assert answer.cached_tokens == hit // PAGE * PAGE

    check()
