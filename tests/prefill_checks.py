"""What holds for every prefill engine, whatever holds its KV."""

from __future__ import annotations

import concurrent.futures
import signal
import time
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
    Sampled by hypothesis.

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


SECOND_TURN_TOKENS, SECOND_TURN_NEW_TOKENS = 500, 100
"""Of the prompt before a second turn, and of its answer."""


def check_a_second_turn(cluster: Cluster, reference: Callable[[list[int]], list[int]]) -> None:
    """It finds the first one, generated tokens included."""
    first = prompt(SECOND_TURN_TOKENS, 10)
    params = {"max_new_tokens": SECOND_TURN_NEW_TOKENS}
    reply = cluster.generate(first, sampling_params=params).output_ids
    cluster.wait_stored()
    cluster.flush_engines()
    second = first + reply + prompt(40, 11)
    answer = cluster.generate(second)
    assert answer.output_ids == reference(second)
    assert answer.cached_tokens == (len(first) + len(reply) - 1) // PAGE * PAGE


def check_agents_that_die(
    cluster: Cluster,
    reference: Callable[[list[int]], list[int]],
    turns: Sequence[list[int]],
    after_s: float,
) -> None:
    """kill -9 of both agents while they deliver what the turns begin with: each answer is right,
    and no page leaks (SGLang's own check is on and would end the engine)."""
    engines, agents = cluster.incarnations("engines"), cluster.incarnations("agents")
    cluster.flush_engines()
    with concurrent.futures.ThreadPoolExecutor(len(turns)) as pool:
        answers = [pool.submit(cluster.generate, turn) for turn in turns]
        time.sleep(after_s)
        for agent in ("agent-p0", "agent-d0"):
            cluster.signal(agent, signal.SIGKILL)
        assert [a.result().output_ids for a in answers] == [reference(turn) for turn in turns]
    cluster.wait_restarted(agents)
    cluster.flush_engines()
    assert cluster.generate(turns[0]).output_ids == reference(turns[0])
    cluster.wait_unharmed(engines)
