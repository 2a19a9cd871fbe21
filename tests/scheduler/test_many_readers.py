"""What n-way promises where there are more agents than share one request."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduler.directory.directory import Run
from scheduler.directory.holder_sets import Holders
from scheduler.hit import Hit, last_byte_s
from scheduler.options import SchedulerOptions
from scheduler.policies import read_policy
from tests.examples import examples
from tests.scheduler.clusters import BLOCK_BYTES, state_of

READERS_MAX = 4
OPTIONS = SchedulerOptions(readers_max=READERS_MAX)
NAMES = tuple(f"a{i}" for i in range(10))

rates = st.lists(st.floats(1e3, 1e7), min_size=2, max_size=len(NAMES))
queues = st.lists(
    st.tuples(st.integers(0, 300_000), st.floats(1e3, 1e7)), min_size=2, max_size=len(NAMES)
)


def remote_hit(blocks: int, agents: int) -> Hit:
    alive = frozenset(NAMES[:agents])
    return Hit([Run(0, blocks, Holders(remote=True))], NAMES[0], NAMES[1], alive, BLOCK_BYTES)


def shares_of(hit: Hit, given: dict[str, tuple[int, float]]) -> dict[str, int]:
    shares = dict.fromkeys(given, 0)
    for part in read_policy("n-way").assign(hit, state_of(given, OPTIONS)):
        shares[part.agent] += part.blocks
    return shares


@examples(300)
@given(st.integers(1, 400), st.floats(0, 5), rates)
def test_a_faster_reader_never_gets_less(blocks, busy_s, rates):
    """All equally far behind, in seconds."""
    given = {name: (int(busy_s * r), r) for name, r in zip(NAMES, rates, strict=False)}
    # Whole bytes make the backlogs differ by up to a byte's time, never by a block's.
    shares = shares_of(remote_hit(blocks, len(rates)), given)
    assert sum(shares.values()) == blocks
    assert sum(share > 0 for share in shares.values()) <= READERS_MAX
    for one in given:
        for other in given:
            if given[one][1] > 1.001 * given[other][1]:
                assert shares[one] >= shares[other]


@examples(300)
@given(st.integers(1, 400), queues)
def test_the_last_byte_is_never_later_than_by_the_papers_rule(blocks, queues):
    given = dict(zip(NAMES, queues, strict=False))
    hit, state = remote_hit(blocks, len(queues)), state_of(given, OPTIONS)
    ends = [
        last_byte_s(hit, read_policy(name).assign(hit, state), state)
        for name in ("n-way", "split", "shorter-queue")
    ]
    assert max(ends[:2]) <= ends[2] * (1 + 1e-9)
