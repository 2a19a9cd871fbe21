"""Fair queuing by tenant: shares, order, and that nobody starves."""

from __future__ import annotations

from collections import Counter
from typing import TypeVar

import hypothesis.strategies as st
from hypothesis import given

from launch.gateway.fair_queue import Entry, FairQueue

COST_MAX = 50
TENANTS_MAX = 6


Item = TypeVar("Item")


def popped(queue: FairQueue[Item]) -> Entry[Item]:
    entry = queue.pop()
    assert entry is not None
    return entry


def order_of(queue: FairQueue[str]) -> list[str]:
    return [popped(queue).item for _ in range(len(queue))]


def test_a_light_tenant_goes_before_a_heavy_ones_second_request():
    queue: FairQueue[str] = FairQueue()
    for number in range(100):
        queue.push("heavy", 1000, 0, f"heavy {number}")
    assert popped(queue).item == "heavy 0"
    queue.push("light", 10, 0, "light")
    assert popped(queue).item == "light"


def test_tokens_are_shared_and_not_requests():
    queue: FairQueue[str] = FairQueue()
    for number in range(40):
        queue.push("long", 100, 0, f"long {number}")
        queue.push("short", 10, 0, f"short {number}")
    tenants = Counter(popped(queue).tenant for _ in range(22))
    assert tenants == {"long": 2, "short": 20}


def test_priority_counts_within_a_tenant_only():
    queue: FairQueue[str] = FairQueue()
    queue.push("a", 10, 0, "a old")
    queue.push("a", 10, 0, "a new")
    queue.push("a", 10, 5, "a urgent")
    queue.push("b", 10, 0, "b")
    assert order_of(queue) == ["a urgent", "b", "a old", "a new"]


def test_users_of_a_tenant_take_turns():
    queue: FairQueue[str] = FairQueue()
    for number in range(4):
        queue.push("a", 100, 0, f"heavy {number}", user="heavy")
    queue.push("a", 10, 0, "light 0", user="light")
    queue.push("a", 10, 0, "light 1", user="light")
    queue.push("a", 10, 3, "urgent", user="heavy")
    assert [popped(queue).item for _ in range(4)] == ["urgent", "heavy 0", "light 0", "light 1"]
    # A stream of new users does not keep an old one waiting.
    went = []
    for number in range(200):
        queue.push("a", 10, 0, f"new {number}", user=f"new {number}")
        went.append(popped(queue).item)
    assert went.index("heavy 3") < 150
    assert len(queue._lines["a"].user_ends) <= len(queue) + 1, "users that are gone are forgotten"


def test_a_user_owes_nothing_for_what_was_taken_out():
    queue: FairQueue[str] = FairQueue()
    queue.push("a", 10, 0, "other", user="other")
    gone = [queue.push("a", 1000, 0, "gone", user="u") for _ in range(3)]
    for entry in reversed(gone):
        queue.remove(entry)
    queue.push("a", 10, 0, "u", user="u")
    queue.push("a", 10, 0, "other again", user="other")
    assert order_of(queue) == ["other", "u", "other again"]


def test_who_leaves_and_comes_again_still_owes():
    queue: FairQueue[str] = FairQueue()
    queue.push("big", 500, 0, "big 0")
    for number in range(10):
        queue.push("small", 50, 0, f"small {number}")
    assert popped(queue).item == "big 0"
    queue.push("big", 500, 0, "big 1")
    assert order_of(queue) == [*(f"small {n}" for n in range(10)), "big 1"]


def test_whoever_was_alone_owes_one_request_and_no_more():
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):
        queue.push("a", 10, 0, "alone")
        popped(queue)
    for number in range(3):
        queue.push("a", 10, 0, f"a {number}")
        queue.push("b", 10, 0, f"b {number}")
    assert order_of(queue) == ["b 0", "a 0", "b 1", "a 1", "b 2", "a 2"]


def test_what_is_removed_is_neither_given_out_nor_paid_for():
    queue: FairQueue[str] = FairQueue()
    gone = queue.push("a", 1000, 0, "gone")
    queue.push("b", 10, 0, "b")
    queue.push("a", 10, 0, "a")
    assert queue.remove(gone) and not queue.remove(gone)
    assert len(queue) == 2 and queue.tenants == 2
    assert order_of(queue) == ["a", "b"]
    assert queue.pop() is None and queue.tenants == 0


def test_last_first_is_the_reverse_of_the_tenants_order():
    queue: FairQueue[str] = FairQueue()
    for priority in (0, 2, 1, 0):
        queue.push("a", 1, priority, str(priority))
    names = [entry.item for entry in queue.last_first("a")]
    assert names == ["0", "0", "1", "2"] and list(queue.last_first("b")) == []
    assert [e.number for e in queue.last_first("a")][:2] == [4, 1]


costs = st.integers(1, COST_MAX)
names = st.sampled_from("abcdef"[:TENANTS_MAX])


@given(st.lists(st.tuples(names, costs, st.integers(-2, 2)), max_size=60))
def test_everything_comes_out_once(requests):
    queue: FairQueue[int] = FairQueue()
    for index, (tenant, cost, priority) in enumerate(requests):
        queue.push(tenant, cost, priority, index)
    items = [entry.item for entry in iter(queue.pop, None)]
    assert sorted(items) == list(range(len(requests)))
    for tenant in set("abcdef"):
        mine = [i for i in items if requests[i][0] == tenant]
        assert mine == sorted(mine, key=lambda i: (-requests[i][2], i))


@given(st.dictionaries(names, st.lists(costs, min_size=1, max_size=30), min_size=2))
def test_shares_of_those_who_wait_differ_by_one_request_at_most(lines):
    queue: FairQueue[int] = FairQueue()
    for tenant, tenant_costs in lines.items():
        for cost in tenant_costs:
            queue.push(tenant, cost, 0, 0)
    largest = max(max(tenant_costs) for tenant_costs in lines.values())
    left = {tenant: len(tenant_costs) for tenant, tenant_costs in lines.items()}
    tokens = Counter(dict.fromkeys(lines, 0))
    while all(left.values()):
        entry = popped(queue)
        left[entry.tenant] -= 1
        tokens[entry.tenant] += entry.cost_tokens
        assert max(tokens.values()) - min(tokens.values()) <= largest


arrivals = st.lists(st.tuples(names, costs), max_size=TENANTS_MAX - 1)


@given(
    before=st.lists(st.tuples(st.booleans(), names, costs), max_size=40),
    cost=costs,
    after=st.lists(arrivals, min_size=1, max_size=8),
    renamed=st.booleans(),
)
def test_nobody_starves_whoever_else_comes(before, cost, after, renamed):
    """A victim waits for a bounded number of tokens, though others, even a new tenant each
    time, come before every turn, for as long as it takes."""
    queue: FairQueue[str] = FairQueue()
    for pops, tenant, tokens in before:
        queue.push(tenant, tokens, 0, "before")
        if pops:
            queue.pop()
    for own in list(queue.last_first("a")):  # the victim's earlier requests would go first
        queue.remove(own)
    queue.push("a", cost, 0, "victim")
    served_tokens = turns = 0
    lines_max = queue.tenants
    while (entry := popped(queue)).item != "victim":
        served_tokens += entry.cost_tokens
        for tenant, tokens in after[turns % len(after)]:
            # As admission does: so many may wait, and no more.
            if queue.tenants < TENANTS_MAX and len(queue) < 100:
                name = f"{tenant} {turns}" if renamed else f"other {tenant}"
                queue.push(name, tokens, 0, "after")
        lines_max = max(lines_max, queue.tenants)
        turns += 1
        assert served_tokens <= 4 * lines_max * COST_MAX
