"""Pages under a transfer are never given out, and none is lost: on SGLang's own allocator."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import runtime
from engine.transfers.page_holds import PageHolds
from tests.engine.parts import hooked_allocator
from tests.examples import examples

PAGE = 4
PAGES = 12


class _Engine:
    def __init__(self, holds):
        self.holds = holds


def _allocator(monkeypatch):
    monkeypatch.setattr(runtime, "_runtime", None)
    # need_sort, as in P/D engines: freed pages are staged apart from the free ones.
    allocator = hooked_allocator()(PAGE * PAGES, PAGE, torch.float32, "cpu", None, True)
    holds = PageHolds(allocator)
    monkeypatch.setattr(runtime, "_runtime", _Engine(holds))
    return allocator, holds


def _pages(rows):
    return (rows[::PAGE] // PAGE).tolist()


def test_a_freed_page_under_transfer_comes_back_only_when_the_job_ends(monkeypatch):
    allocator, holds = _allocator(monkeypatch)
    rows = allocator.alloc(2 * PAGE)
    holds.hold(1, _pages(rows))
    allocator.free(rows)
    assert allocator.available_size() == (PAGES - 2) * PAGE
    assert holds.deferred_tokens == 2 * PAGE
    holds.release(1)
    assert allocator.available_size() == PAGES * PAGE
    assert holds.deferred_tokens == 0


def test_a_flush_keeps_held_pages_out_of_the_pool(monkeypatch):
    allocator, holds = _allocator(monkeypatch)
    rows = allocator.alloc(3 * PAGE)
    holds.hold(7, _pages(rows))
    allocator.clear()
    assert allocator.available_size() == (PAGES - 3) * PAGE
    assert not set(_pages(rows)) & set(allocator.get_all_free_pages().tolist())
    holds.release(7)
    assert sorted(allocator.get_all_free_pages().tolist()) != list(range(1, PAGES + 1))
    assert allocator.available_size() == PAGES * PAGE
    assert sorted(allocator.get_all_free_pages().tolist()) == list(range(1, PAGES + 1))


def test_two_jobs_on_one_page(monkeypatch):
    allocator, holds = _allocator(monkeypatch)
    rows = allocator.alloc(PAGE)
    holds.hold(1, _pages(rows))
    holds.hold(2, _pages(rows))
    allocator.free(rows)
    holds.release(1)
    assert allocator.available_size() == (PAGES - 1) * PAGE
    holds.release(2)
    assert allocator.available_size() == PAGES * PAGE


_STEPS = st.lists(
    st.tuples(st.sampled_from(["alloc", "free", "hold", "release", "flush"]), st.integers(0, 30)),
    max_size=40,
)


@examples(60)
@given(steps=_STEPS)
def test_no_page_is_lost_or_given_out_twice(steps):
    with pytest.MonkeyPatch.context() as patch:
        allocator, holds = _allocator(patch)
        _run(steps, allocator, holds)


def _run(steps, allocator, holds):
    owned, held, job = [], {}, 0
    for step, number in steps:
        if step == "alloc":
            rows = allocator.alloc((number % 3 + 1) * PAGE)
            if rows is not None:
                under_transfer = {p for pages in held.values() for p in pages}
                assert not under_transfer & set(_pages(rows))
                owned.append(rows)
        elif step == "free" and owned:
            allocator.free(owned.pop(number % len(owned)))
        elif step == "hold" and owned:
            job += 1
            held[job] = _pages(owned[number % len(owned)])
            holds.hold(job, held[job])
        elif step == "release" and held:
            holds.release(ended := list(held)[number % len(held)])
            del held[ended]
        elif step == "flush":
            allocator.clear()
            owned.clear()
        in_use = sum(len(rows) for rows in owned)
        free_tokens = holds.free_tokens
        assert allocator.available_size() == free_tokens
        assert free_tokens + holds.deferred_tokens + in_use == PAGES * PAGE
    for ended in list(held):
        holds.release(ended)
    for rows in owned:
        allocator.free(rows)
    assert allocator.available_size() == PAGES * PAGE
    assert sorted(allocator.get_all_free_pages().tolist()) == list(range(1, PAGES + 1))
