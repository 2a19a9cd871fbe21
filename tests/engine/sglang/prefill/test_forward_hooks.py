"""SGLang's calls around a forward reach the one that is followed, and nobody else's."""

from types import SimpleNamespace
from typing import Any

import pytest

from engine.sglang.prefill import forward_hooks, request_hooks, send_hooks
from engine.sglang.prefill.forward_hooks import (
    after_finish_loads,
    after_run_batch,
    around_layer_attention,
    before_latent_write,
    before_run_batch,
)


class Forwards:
    """What the hooks use of :class:`engine.prefill.forwards.PrefillForwards`."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.current: Any = None
        self.window: Any = None
        self.suffix = SimpleNamespace(is_in_flight=lambda room: room == 7)
        self.prefix_errors: dict[str, str] = {}

    def begin(self, batch: Any) -> None:
        self.current = SimpleNamespace(
            before_attention=lambda layer: self.seen.append(("before", layer)),
            after_attention=lambda layer: self.seen.append(("after", layer)),
            window=self.window,
        )

    def end(self) -> None:
        self.current = None

    def has_window(self) -> None:
        self.window = SimpleNamespace(
            failed=lambda: self.prefix_errors, abandon=lambda: self.seen.append("abandoned")
        )


class Tree:
    """Ranks agree on the least of each flag; another one has lost what ``lost_there`` says."""

    def __init__(self, *lost_there: int) -> None:
        self._lost_there = list(lost_there)

    def _all_reduce_attn_groups(self, flags: Any, op: Any) -> None:
        flags[self._lost_there] = 0


@pytest.fixture
def forwards(monkeypatch):
    forwards = Forwards()
    plans = SimpleNamespace(arrives=lambda rid: False, is_outdated=lambda rid: False)
    engine = SimpleNamespace(prefill_forwards=forwards, plans=plans)
    monkeypatch.setattr(forward_hooks, "runtime_if_up", lambda: engine)
    monkeypatch.setattr(request_hooks, "runtime_if_up", lambda: engine)
    return forwards


def batch(extends: bool = True) -> SimpleNamespace:
    return SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: extends))


def attention(forwards: Forwards, layer: int) -> str:
    def original(_: Any) -> str:
        forwards.seen.append(("runs", layer))
        return "output"

    return around_layer_attention(original, SimpleNamespace(layer_id=layer))


def test_a_layer_is_told_before_its_attention_and_after_it(forwards):
    before_run_batch(None, batch())
    assert attention(forwards, 0) == "output"
    before_latent_write(None, SimpleNamespace(layer_id=1))
    after_run_batch(None, None)
    assert attention(forwards, 5) == "output"  # no forward is followed any more
    assert forwards.seen == [("before", 0), ("runs", 0), ("after", 0), ("before", 1), ("runs", 5)]


def test_a_forward_of_other_than_prompts_is_not_followed(forwards):
    before_run_batch(None, batch(extends=False))
    assert forwards.current is None


def test_nothing_is_followed_before_the_engine_is_up(monkeypatch):
    monkeypatch.setattr(forward_hooks, "runtime_if_up", lambda: None)
    before_run_batch(None, batch())
    assert around_layer_attention(lambda _: "output", None) == "output"


def test_requests_whose_prefix_is_lost_at_any_rank_are_dropped_with_those_of_sglang(forwards):
    forwards.has_window()
    forwards.prefix_errors = {"b": "timed out"}
    before_run_batch(None, batch())
    requests = [SimpleNamespace(rid=rid, discard_output_reason=None) for rid in "abc"]
    failed = after_finish_loads(["of SGLang"], Tree(2), requests)
    assert failed == ["of SGLang", requests[1], requests[2]]
    assert [req.discard_output_reason is not None for req in requests] == [False, True, True]
    assert forwards.seen == ["abandoned"]


def test_without_a_window_sglang_knows_best_what_was_lost(forwards):
    before_run_batch(None, batch())
    assert after_finish_loads(["of SGLang"], Tree(0), [SimpleNamespace(rid="a")]) == ["of SGLang"]


@pytest.mark.parametrize("has_window", [True, False])
def test_with_a_window_nothing_enters_the_radix_tree(forwards, has_window):
    if has_window:
        forwards.has_window()
    request = SimpleNamespace(rid="a", skip_radix_cache_insert=False)
    request_hooks.before_add_request(None, request)
    assert request.skip_radix_cache_insert == has_window


def test_an_abort_is_acknowledged_when_nothing_of_it_is_in_flight(forwards):
    acknowledged: list[int] = []
    for room in (7, 8):
        send_hooks.around_drained_abort(lambda _, room: acknowledged.append(room), None, room)
    assert acknowledged == [8]
